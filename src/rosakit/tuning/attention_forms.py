"""The forms in which windowed attention is computed, chosen by a model's `attn_implementation`.

* ``sdpa``: torch's scaled-dot-product attention; long whole sequences in blocks.
* ``eager``: products and a softmax in plain torch, for models that change the scores in between
  (soft-capping, learned sink logits), and as the reference of the others; also in blocks.
* ``flex``: FlexAttention with the window as a block mask, for long whole sequences and prefill
  chunks on a GPU; short queries (decoding) go to ``sdpa`` or ``eager``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.tuning.window import Positions

Form = Literal["sdpa", "eager", "flex"]

_FORMS: dict[str | None, Form] = {
    None: "sdpa",
    "sdpa": "sdpa",
    "eager": "eager",
    "flex_attention": "flex",
}

FLEX_QUERIES = 128
"""Fewest queries for which FlexAttention is used: the rows of one of its blocks."""


@dataclass(frozen=True)
class Scores:
    """What a model does to its attention scores.

    Attributes:
        scaling: factor of the products; None for ``1 / sqrt(D)``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: logits ``[H]`` that take part in the softmax and are then dropped (gpt-oss).
        dropout: probability that a weight is dropped.
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether torch's scaled-dot-product attention computes this."""
        return self.softcap is None and self.sinks is None


def form_of(implementation: str | None, *, sinks: bool, name: str) -> Form:
    """The form for a model's attention implementation.

    Args:
        implementation: what the model was loaded with.
        sinks: the model has learned sink logits.
        name: the model's name, for messages.

    Raises:
        UnsupportedModelError: an implementation that cannot compute a window with sinks.
    """
    if implementation not in _FORMS:
        raise UnsupportedModelError(
            f"{name} was loaded with attn_implementation={implementation!r}, which computes no "
            "window with sink tokens; load it with 'sdpa', 'eager' or 'flex_attention', or attach "
            "with window=None"
        )
    form = _FORMS[implementation]
    if form == "flex" and sinks:
        raise UnsupportedModelError(
            f"{name} has learned sink logits, which the FlexAttention form does not compute; load "
            "it with attn_implementation='eager'"
        )
    return form


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scores: Scores,
    form: Form,
) -> Tensor:
    """Attention with a dense mask.

    Args:
        query: ``[B, H, q, D]``.
        key, value: ``[B, G, k, D]``.
        mask: bool ``[B or 1, 1, q, k]``; None for causal attention (all keys if q is 1).

    Returns:
        ``[B, q, H, D]``.
    """
    if form != "eager" and scores.plain:
        if mask is not None and mask.shape[0] != query.shape[0]:
            mask = mask.expand(query.shape[0], -1, -1, -1)
        out: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=scores.dropout, scaling=scores.scaling
        )[0]
        return out
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    return eager(query, key, value, mask, scores).transpose(1, 2).contiguous()


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """``softmax(scores) v`` in plain torch, the softmax in float32.

    Args:
        query: ``[N, H, q, D]``; `H` may be several batch rows' heads in a row.
        key, value: ``[N, H, k, D]``.
        mask: bool, broadcast to ``[N, H, q, k]``, or None.

    Returns:
        ``[N, H, q, D]``.
    """
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    weight = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if scores.softcap is not None:
        weight = torch.tanh(weight / scores.softcap) * scores.softcap
    if mask is not None:
        weight = weight.masked_fill(~mask, torch.finfo(weight.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.repeat(weight.shape[1] // len(scores.sinks)).to(weight.dtype)
        weight = torch.cat([weight, sinks[:, None, None].expand(*weight.shape[:3], 1)], dim=-1)
    weight = weight.softmax(-1, dtype=torch.float32).to(query.dtype)
    if scores.sinks is not None:
        weight = weight[..., :-1]
    if scores.dropout:
        weight = nn.functional.dropout(weight, scores.dropout)
    return torch.matmul(weight, value)


def block_mask(
    query: Positions, key: Positions, window: int | None, sink_tokens: int
) -> flex.BlockMask:
    """The rule of `rosakit.tuning.window` as FlexAttention's block mask.

    Args:
        query: positions ``[B or 1, q]``.
        key: positions ``[B or 1, k]``.
        window: W, or None for full attention.
        sink_tokens: S.
    """
    rows = max(len(query.segment), len(key.segment))
    (q_segment, q_rank), (k_segment, k_rank) = (
        (x.expand(rows, -1).contiguous() for x in where) for where in (query, key)
    )
    reach = int(torch.iinfo(torch.int32).max) if window is None else window

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = b if rows > 1 else b * 0  # one layout for all rows
        distance = q_rank[row, i] - k_rank[row, j]
        seen = (q_segment[row, i] == k_segment[row, j]) & (distance >= 0)
        return seen & ((distance < reach) | (k_rank[row, j] < sink_tokens))

    device = query.rank.device
    return flex.create_block_mask(
        rule,
        rows,
        None,
        query.rank.shape[1],
        key.rank.shape[1],
        device=str(device),
        # Compiled, the mask of a long sequence is never written out.
        _compile=device.type == "cuda" and not torch.compiler.is_compiling(),
    )


def flexible(
    query: Tensor, key: Tensor, value: Tensor, mask: flex.BlockMask, scores: Scores
) -> Tensor:
    """FlexAttention within a block mask.

    Args:
        query: ``[B, H, q, D]``.
        key, value: ``[B, G, k, D]``.

    Returns:
        ``[B, q, H, D]``.

    Raises:
        InvalidInputError: dropout, or gradients on a CPU.
    """
    if scores.dropout:
        raise InvalidInputError(
            f"FlexAttention has no dropout (attention_dropout={scores.dropout}); set it to 0 in "
            "the model's configuration, or load the model with attn_implementation='sdpa'"
        )
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and learning:
        raise InvalidInputError(
            "FlexAttention has no backward pass on a CPU; train with attn_implementation='sdpa'"
        )
    cap = 1.0 if scores.softcap is None else scores.softcap

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    attend = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else _plain
    out: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else capped,
        block_mask=mask,
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


_plain: Any = flex.flex_attention


@cache
def _compiled() -> Any:
    """FlexAttention's kernel; compiled once, again where shapes change more than once."""
    return torch.compile(flex.flex_attention)
