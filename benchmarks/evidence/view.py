"""Who sees whom in one arm: window, sinks, and spans recalled by exact matching.

An attention for experiments: whole sequences without padding on the left, keys and values of all
positions at hand, so that every rule is a mask. A recalled span is the surroundings of what
followed an earlier occurrence of the present context: for the K best distinct successors at
``p_1 … p_K`` (semantics section 5) a query also sees positions ``p_k - before … p_k + after - 1``,
with their own keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.evidence import blocks
from rosakit.layers.token_match import best_successors
from rosakit.types import Match

NAME = "rosakit_evidence"
CHUNK = 1024
"""Queries whose scores over all earlier keys are held at once."""


@dataclass(frozen=True)
class View:
    """A rule.

    Attributes:
        window: tokens that a query sees, itself included; None for all.
        sinks: first tokens that stay visible.
        recall: K, matches whose surroundings are seen as well; 0 for none.
        before, after: tokens of the surroundings, in front of the successor and from it on.
        least: shorter matches recall nothing.
        address: "match", or "random": as many spans at places that mean nothing (a control).
        layers: indices of the layers that recall; None for all.
    """

    window: int | None = None
    sinks: int = 4
    recall: int = 0
    before: int = 8
    after: int = 8
    least: int = 1
    address: Literal["match", "random"] = "match"
    layers: tuple[int, ...] | None = None


def scattered(found: Match) -> Match:
    """Places that mean nothing, as many as there are matches and as reproducible."""
    position = found.position.to(torch.int64)
    length, rank = torch.arange(position.shape[1]), torch.arange(position.shape[2])
    # Knuth's multiplicative hash of position and rank, reduced to the places seen so far.
    mixed = (length[:, None] * 2654435761 + (rank[None] + 1) * 40503 * 65537) % 2**32
    place = (mixed // 8) % (length[:, None] + 1)
    place = place.to(position.device).expand_as(position)
    return Match(torch.where(position >= 0, place, -1).to(torch.int32), found.length)


class Seen:
    """The rule applied to one batch of token ids ``[B, T]``."""

    def __init__(self, view: View, ids: Tensor, dtype: torch.dtype) -> None:
        self.view, self.dtype, self.device = view, dtype, ids.device
        self.length = ids.shape[1]
        self.spans: Tensor | None = None
        if view.recall and view.window is not None:
            found = best_successors(ids, view.recall, min_length=view.least)
            if view.address == "random":
                found = scattered(found)
            position = found.position.to(torch.int64)
            offset = torch.arange(-view.before, view.after, device=ids.device)
            spans = position[..., None] + offset
            own = torch.arange(self.length, device=ids.device)[None, :, None, None]
            valid = (position[..., None] >= 0) & (spans >= 0) & (spans <= own)
            self.spans = torch.where(valid, spans, -1).flatten(2)
        self._bias: dict[tuple[int, bool], Tensor] = {}
        self._tiled: dict[bool, BlockMask] = {}

    def mask(self, start: int, stop: int, recall: bool) -> Tensor:
        """Who sees whom, bool ``[B or 1, stop - start, stop]``, of the queries from `start` on."""
        query = torch.arange(start, stop, device=self.device)[:, None]
        key = torch.arange(stop, device=self.device)
        seen = key <= query
        if self.view.window is not None:
            seen = seen & ((query - key < self.view.window) | (key < self.view.sinks))
        seen = seen[None]
        if recall and self.spans is not None:
            part = self.spans[:, start:stop]
            rows = torch.zeros(*part.shape[:2], stop + 1, dtype=torch.bool, device=self.device)
            rows.scatter_(2, torch.where(part >= 0, part, stop), True)
            seen = seen | rows[..., :stop]
        return seen

    def bias(self, start: int, recall: bool) -> Tensor:
        """Additive mask ``[B or 1, 1, n, start + n]`` of the queries from `start` on."""
        if (start, recall) not in self._bias:
            seen = self.mask(start, min(start + CHUNK, self.length), recall)
            bias = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            self._bias[start, recall] = bias.masked_fill_(~seen, float("-inf"))[:, None]
        return self._bias[start, recall]

    def tiled(self, recall: bool) -> BlockMask:
        """The mask of the whole batch in blocks, padded."""
        if recall not in self._tiled:
            size = blocks.padded(self.length)
            if recall:
                self._tiled[recall] = blocks.blocks_of(self._whole(size))
            else:
                self._tiled[recall] = _near(replace(self.view, recall=0), size, self.device)
        return self._tiled[recall]

    def _whole(self, size: int) -> Tensor:
        """The mask of all queries ``[B or 1, size, size]``; padding sees nothing."""
        rows = []
        for start in range(0, self.length, CHUNK):
            part = self.mask(start, min(start + CHUNK, self.length), True)
            rows.append(F.pad(part, (0, size - part.shape[2])))
        return F.pad(torch.cat(rows, 1), (0, 0, 0, size - self.length))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float | None) -> Tensor:
        """``[B, H, T, D]`` from queries ``[B, H, T, D]``, keys and values ``[B, G, T, D]``.

        On a GPU block by block; elsewhere, and as what that is compared with, in `products`.
        """
        view = self.view
        recall = self.spans is not None and (view.layers is None or layer in view.layers)
        if q.is_cuda and view.window is not None:
            return blocks.attend(q, k, v, self.tiled(recall), scale)
        return self.products(q, k, v, recall, scale)

    def products(
        self, q: Tensor, k: Tensor, v: Tensor, recall: bool, scale: float | None
    ) -> Tensor:
        """The same in plain products."""
        view = self.view
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if view.window is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if not recall and self.length > 2 * view.window:
            return _banded(q, k, v, view.window, view.sinks, scale)
        parts = []
        for start in range(0, self.length, CHUNK):
            stop = min(start + CHUNK, self.length)
            bias = self.bias(start, recall).expand(q.shape[0], q.shape[1], -1, -1)
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], attn_mask=bias, scale=scale
                )
            )
        return torch.cat(parts, dim=2)


@lru_cache(8)
@torch.inference_mode(False)  # training keeps for its backward pass what an evaluation has cached
def _near(view: View, length: int, device: torch.device) -> BlockMask:
    """Window and sinks of any sequence of that length."""
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    return blocks.blocks_of(Seen(view, ids, torch.float32)._whole(length))


def _banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float | None
) -> Tensor:
    """The window and its sinks in blocks of W queries, each with 2 W - 1 keys and the sinks."""
    batch, heads, length, width = q.shape
    blocks = -(-length // window)
    tail = blocks * window - length
    q = F.pad(q, (0, 0, 0, tail)).view(batch, heads, blocks, window, width)

    def near(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, window - 1, tail))
        band = padded.unfold(2, 2 * window - 1, window).transpose(-1, -2)
        first = x[:, :, None, :sinks].expand(-1, -1, blocks, -1, -1)
        return torch.cat([first, band], dim=3)

    block = torch.arange(blocks, device=q.device)[:, None, None]
    query = block * window + torch.arange(window, device=q.device)[None, :, None]
    key = block * window + torch.arange(1 - window, window, device=q.device)[None, None]
    band = (key >= 0) & (key <= query) & (query - key < window)
    sink = torch.arange(sinks, device=q.device).expand(blocks, window, sinks)
    far = sink <= query - window  # the others are in the band already
    seen = torch.cat([far, band], dim=2)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(~seen, float("-inf"))
    # Rows and heads become heads of one batch of blocks, so that the mask is never copied.
    q, keys, values = (x.flatten(0, 1).transpose(0, 1) for x in (q, near(k), near(v)))
    out = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=_aligned(bias[:, None]).expand(-1, q.shape[1], -1, -1),
        scale=scale,
    )  # fmt: skip
    out = out.transpose(0, 1).reshape(batch, heads, blocks * window, width)
    return out[:, :, :length]


def _aligned(bias: Tensor) -> Tensor:
    """The same mask in rows of a multiple of 16 entries, as fused kernels want them."""
    spare = -bias.shape[-1] % 16
    return F.pad(bias, (0, spare))[..., : bias.shape[-1]] if spare else bias


class _Current:
    seen: Seen | None = None


_current = _Current()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert _current.seen is not None
    seen = _current.seen
    query, key, value = (x.to(seen.dtype) for x in (query, key, value))
    out = seen.attend(query, key, value, module.layer_idx, scaling)
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def viewing(model: Any, view: View) -> Iterator[None]:
    """Inside the block the model's layers see what the view says."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)

    def prepare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        _current.seen = Seen(view, ids, next(model.parameters()).dtype)
        return args, {**kwargs, "use_cache": False}

    hook = model.get_decoder().register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        model.set_attn_implementation(before)
        _current.seen = None
