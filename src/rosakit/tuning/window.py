"""Windowed attention with sinks, exact in every situation a decoder meets.

Who sees whom is decided by two integers per position, whatever the layout of the batch:

* `segment`: which document of which row it belongs to; padding is -1;
* `rank`: how many real tokens of that document come before it.

A query sees a key of its segment if ``0 <= rank_q - rank_k < W`` (the window, the current token
included) or ``rank_k < S`` and ``rank_k <= rank_q`` (the sinks). Padding, packed documents, a
cache that has dropped most of its keys and the block form all reduce to this one rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rosakit.errors import InvalidInputError

PADDING = -1
"""Segment of padding positions: they see each other only, so that no softmax row is empty."""

OUTSIDE = -2
"""Segment of places that hold no position: empty cache slots, the margin of a block."""

NOWHERE = -3
"""Segment of sink places that repeat a key which is in view already: nobody sees them."""


class Positions(NamedTuple):
    """Where tokens stand: integers ``[B, n]`` each, ``[1, n]`` where all rows are alike."""

    segment: Tensor
    rank: Tensor


def positions(length: int, segment_starts: Tensor | None, device: torch.device) -> Positions:
    """Positions of whole sequences.

    Args:
        length: T.
        segment_starts: int32 ``[B, T]`` (see `rosakit.ops.segments`), None for plain rows.
    """
    index = torch.arange(length, device=device, dtype=torch.int32)[None]
    if segment_starts is None:
        return Positions(torch.zeros_like(index), index)
    real = segment_starts >= 0
    return Positions(segment_starts, torch.where(real, index - segment_starts, 0))


def visible(query: Positions, key: Positions, window: int | None, sink_tokens: int) -> Tensor:
    """The rule: bool ``[B, q, k]`` (extra leading dimensions of the positions are kept)."""
    same = query.segment[..., :, None] == key.segment[..., None, :]
    distance = query.rank[..., :, None] - key.rank[..., None, :]
    seen = same & (distance >= 0)
    if window is None:
        return seen
    return seen & ((distance < window) | (key.rank[..., None, :] < sink_tokens))


class AttentionPlan:
    """The positions of one forward pass, and the masks that its layers share.

    Args:
        query: positions of this chunk.
        windowed: gives the positions of the keys that windowed layers see (as their cache returns
            them).
        full: gives the positions of all keys so far, for layers without a window.
        plain: nothing but real tokens of one document a row, so far.
        whole: no earlier chunk: the keys are this chunk's.
        clear: every query sees every key that the windowed layers' cache returns.
        contiguous: real positions of a segment are neighbours (needed by the block form).
        block: least number of positions from which whole sequences are computed in blocks;
            None for ``2 * window``.
    """

    def __init__(
        self,
        query: Positions,
        windowed: Callable[[], Positions],
        full: Callable[[], Positions],
        *,
        plain: bool,
        whole: bool,
        clear: bool = False,
        contiguous: bool = True,
        block: int | None = None,
    ) -> None:
        self.query, self.windowed, self.full = query, windowed, full
        self.plain, self.whole, self.clear = plain, whole, clear
        self.contiguous, self.block = contiguous, block
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}
        self._made: dict[tuple[Any, ...], Any] = {}

    def mask(self, window: int | None, sink_tokens: int, keys: int, *, held: bool) -> Tensor | None:
        """Dense mask ``[B or 1, 1, q, keys]``; None where causal attention is the same.

        Args:
            window: None for full attention.
            sink_tokens: sinks beyond the window.
            keys: number of keys that the layer has.
            held: the keys come from a cache of sinks and window, not from a full one.
        """
        name = (window, sink_tokens, keys, held)
        if name not in self._masks:
            self._masks[name] = self._dense(window, sink_tokens, keys, held)
        return self._masks[name]

    def _dense(self, window: int | None, sink_tokens: int, keys: int, held: bool) -> Tensor | None:
        length = self.query.rank.shape[1]
        if self.clear and held:
            return None
        if self.plain and (self.whole or length == 1):
            # A full key list may lack the right sinks to skip.
            kept = sink_tokens if self.whole else 0
            if window is None or keys <= window + kept:
                return None
        return visible(self.query, self.keys(keys, held), window, sink_tokens)[:, None]

    def keys(self, count: int, held: bool) -> Positions:
        """Positions ``[B or 1, count]`` of a layer's keys.

        Raises:
            InvalidInputError: the layer has more keys than tokens were seen.
        """
        source = self.windowed() if held else self.full()
        total = source.rank.shape[1]
        if count > total:
            raise InvalidInputError(
                f"an attention layer holds {count} keys where {total} tokens were seen; the cache "
                "was changed outside the model, start with a fresh one"
            )
        # A cache that keeps the last keys only (a model's own sliding window) holds the tail.
        return Positions(source.segment[:, total - count :], source.rank[:, total - count :])

    def once(self, name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made once a forward pass."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def blocks(self, window: int, sink_tokens: int) -> Blocks:
        """The block form's layout and masks."""
        made: Blocks = self.once(
            ("blocks", window, sink_tokens), lambda: Blocks(self.query, window, sink_tokens)
        )
        return made

    def wants_blocks(self, window: int | None, sink_tokens: int) -> bool:
        """Whether whole sequences this long are computed in blocks."""
        length = self.query.rank.shape[1]
        if window is None or not (self.whole and self.contiguous):
            return False
        least = max(2 * window, window + sink_tokens) if self.block is None else self.block
        return length > least


class Blocks:
    """Layout of the block form: query blocks of `size`, each with its keys and its sinks.

    Block ``n`` holds queries ``[n size, (n+1) size)``, keys ``[n size - (W-1), (n+1) size)`` and
    the sinks of the one document that can reach further back: the one that its first query is in.
    (Sinks of documents that start later are among the keys.)
    """

    def __init__(self, query: Positions, window: int, sink_tokens: int) -> None:
        rows, length = query.segment.shape[0], query.segment.shape[1]
        device = query.rank.device
        self.size, self.reach, self.sinks = block_size(window, device), window - 1, sink_tokens
        self.count = -(-length // self.size)
        self.tail = self.count * self.size - length
        outside = Positions(
            F.pad(query.segment, (self.reach, self.tail), value=OUTSIDE),
            F.pad(query.rank, (self.reach, self.tail), value=0),
        )
        span = self.reach + self.size
        keys = Positions(
            outside.segment.unfold(1, span, self.size), outside.rank.unfold(1, span, self.size)
        )
        queries = Positions(*(x[..., self.reach :] for x in keys))
        first = torch.arange(self.count, device=device) * self.size
        if sink_tokens:
            # Document of the first query; at padding the latest document before it.
            index = torch.arange(length, device=device)
            start = torch.where(query.segment >= 0, index - query.rank, -1).cummax(1).values
            start = start[:, first]
            self.sink_index = start[..., None] + torch.arange(sink_tokens, device=device)
            apart = (start[..., None] >= 0) & (self.sink_index < first[:, None] - self.reach)
            self.sink_index = self.sink_index.clamp(0, length - 1).view(rows, -1)
            shape = (rows, self.count, sink_tokens)
            keys = Positions(
                torch.cat(
                    [
                        torch.where(
                            apart, query.segment.gather(1, self.sink_index).view(shape), NOWHERE
                        ),
                        keys.segment,
                    ],
                    -1,
                ),
                torch.cat([query.rank.gather(1, self.sink_index).view(shape), keys.rank], -1),
            )
        self.mask = visible(queries, keys, window, sink_tokens)  # [rows, count, size, S + span]

    def split_queries(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[B, H, count, size, D]``."""
        padded = F.pad(x, (0, 0, 0, self.tail))
        return padded.view(*x.shape[:2], self.count, self.size, x.shape[3])

    def split_keys(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` -> ``[B, H, count, S + span, D]``."""
        padded = F.pad(x, (0, 0, self.reach, self.tail))
        near = padded.unfold(2, self.reach + self.size, self.size).transpose(-1, -2)
        if not self.sinks:
            return near
        index = self.sink_index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
        far = x.gather(2, index).view(*x.shape[:2], self.count, self.sinks, x.shape[3])
        return torch.cat([far, near], dim=3)


def block_size(window: int, device: torch.device) -> int:
    """Queries a block, for which keys are gathered from ``W - 1`` further back.

    Half a window is fastest on a CPU (measured at W = 256 and 512); elsewhere a whole one, since
    larger blocks copy fewer keys.
    """
    return max(16, window // 2) if device.type == "cpu" else max(64, window)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Windowed attention of whole sequences in ``O(T W)``; equals the dense-mask form.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, G, T, D]`` with ``H`` a multiple of ``G``.
        blocks: the layout for this batch's positions.
        attend: attention of ``[N, H', q, D]`` queries with as many key heads under a bool mask
            ``[N, 1, q, k]``; `H'` may be several rows' heads.

    Returns:
        ``[B, T, H, D]``.
    """
    batch, heads, length, _ = query.shape
    q = blocks.split_queries(query)
    k, v = (_repeat_heads(blocks.split_keys(x), heads) for x in (key, value))
    mask = blocks.mask
    if mask.shape[0] == 1:
        # One layout for all rows: rows become heads, so that the mask is never copied.
        q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
        mask = mask[0, :, None]
    else:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        mask = mask.flatten(0, 1)[:, None]
    out = attend(q, k, v, mask)
    if blocks.mask.shape[0] == 1:
        out = out.transpose(0, 1).reshape(batch, heads, -1, out.shape[-1])
    else:
        out = out.view(batch, blocks.count, *out.shape[1:]).transpose(1, 2).flatten(2, 3)
    return out[:, :, :length].transpose(1, 2).contiguous()


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
