"""`WindowIndex`: which tokens the windowed layers of a cache hold, decided once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.tuning.window import OUTSIDE, PADDING, Positions

RESERVE = 64
"""Tokens held behind the window, so that a rollback of up to so many (the rejected drafts of
assisted decoding) finds what becomes visible again. They are not attended to."""


class _Layout(NamedTuple):
    """Ranks of the slots when all rows are alike: ``first..start``, the sinks, ``start..stop``.

    The part before the sinks is the reserve, the part behind them the window; as long as nothing
    was dropped, `first` equals `start` and the slots are simply in order.
    """

    first: int
    sinks: int
    start: int
    stop: int

    @property
    def reserve(self) -> int:
        return self.start - self.first

    @property
    def held(self) -> int:
        return self.reserve + self.sinks + self.stop - self.start

    def slots(self, begin: int, end: int) -> list[slice]:
        """Where the ranks ``begin..end`` (no sinks) are."""
        behind = self.reserve + self.sinks - self.start
        parts = [
            slice(begin - self.first, min(end, self.start) - self.first),
            slice(max(begin, self.start) + behind, end + behind),
        ]
        return [part for part in parts if part.stop > part.start]


class WindowIndex:
    """Which tokens the windowed layers of a cache hold.

    Each row holds its sinks, its last ``W - 1`` tokens and a small reserve behind them. Ranks count
    a row's real tokens, so padding and gaps leave no trace. As long as no padding was seen
    (`plain`) all rows are alike and slices suffice; later every row has its own table of ranks.

    Args:
        window: W, the current token included; None if no layer is windowed.
        sink_tokens: S.
        reserve: tokens held for rollbacks; None for `RESERVE`.

    Attributes:
        length: positions seen, padding included.
        record_past: nothing is dropped until the next crop.
        valid: bool ``[B, length]``, real positions; None while plain.
        rank: int64 ``[B, held]``, rank of each slot's token, -1 for an empty one; None while plain.
    """

    def __init__(self, window: int | None, sink_tokens: int, reserve: int | None = None) -> None:
        self.window, self.sinks = window, sink_tokens
        self.reserve = RESERVE if reserve is None else reserve
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.plain = True
        self.valid: Tensor | None = None
        self.rank: Tensor | None = None
        self._place: Tensor | None = None  # [B, held], position of each slot's token in its row
        self._layout = _Layout(0, 0, 0, 0)
        self._keep: Tensor | list[slice] | None = None
        self._hidden = 0

    @property
    def held(self) -> int:
        """Slots per row."""
        return self._layout.held if self.rank is None else self.rank.shape[1]

    @property
    def visible(self) -> int:
        """Most slots that a next query can see."""
        return self.sinks + (self.window or 1) - 1

    def advance(
        self, mask: Tensor | None, chunk: int, device: torch.device
    ) -> tuple[Positions, Positions, Callable[[], Positions]]:
        """Take in a chunk; the layers' updates of this forward pass follow the decision made here.

        Args:
            mask: bool ``[B, chunk]``, real positions; None if all are.
            chunk: number of new positions.

        Returns:
            Positions of the chunk, of the windowed layers' keys, and a call that gives those of
            all keys so far (many tokens, rarely needed).

        Raises:
            InvalidInputError: the chunk has another number of rows than the cache.
        """
        if mask is not None and self.plain:
            self._leave_plain(mask.shape[0], device)
        before = self.length
        self.length += chunk
        if self.rank is None:
            return self._advance_plain(before, device)
        assert self.valid is not None
        assert self._place is not None
        if mask is None:
            mask = self.valid.new_ones((self.valid.shape[0], chunk))
        if mask.shape[0] != self.valid.shape[0]:
            raise InvalidInputError(
                f"the cache holds {self.valid.shape[0]} rows, this chunk has {mask.shape[0]}"
            )
        self.valid = torch.cat([self.valid, mask], dim=1)
        full_rank = torch.where(self.valid, self.valid.cumsum(1) - 1, 0)
        full = Positions(torch.where(self.valid, 0, PADDING), full_rank)
        query = Positions(full.segment[:, before:], full_rank[:, before:])
        seen = self.rank[:, self._count_hidden(self.rank.shape[1]) :]
        held = Positions(torch.where(seen >= 0, 0, OUTSIDE), seen.clamp(min=0))
        windowed = Positions(*(torch.cat(pair, 1) for pair in zip(held, query, strict=True)))
        self._hidden = self.rank.shape[1] - seen.shape[1]
        here = torch.arange(before, self.length, device=device).expand_as(mask)
        self._retain(
            torch.cat([self.rank, torch.where(mask, query.rank, -1)], dim=1),
            torch.cat([self._place, here], dim=1),
            trim=not self.record_past,
        )
        return query, windowed, lambda: full

    def _advance_plain(
        self, before: int, device: torch.device
    ) -> tuple[Positions, Positions, Callable[[], Positions]]:
        def between(*bounds: tuple[int, int]) -> Positions:
            rank = torch.cat([torch.arange(*pair, device=device) for pair in bounds])[None]
            return Positions(torch.zeros_like(rank), rank)

        length, old = self.length, self._layout
        query = between((before, length))
        if self.window is None:
            self._layout = _Layout(0, 0, 0, length)
            return query, query, lambda: between((0, length))
        self._hidden = old.reserve
        windowed = between((0, old.sinks), (old.start, length))
        sinks = min(self.sinks, length) if before <= self.sinks else old.sinks
        # Before anything was dropped slots are in order, and the first of them are the sinks.
        start = sinks if old.start == old.sinks else old.start
        full = _Layout(start - old.reserve, sinks, start, length)
        self._keep, self._layout = self._plan(full, length, trim=not self.record_past)
        return query, windowed, lambda: between((0, length))

    def _plan(
        self, source: _Layout, length: int, *, trim: bool
    ) -> tuple[list[slice] | None, _Layout]:
        """Slots of `source` to keep after `length` tokens (None for all), and their layout."""
        if self.window is None:
            return None, _Layout(0, 0, 0, length)
        sinks = min(self.sinks, length)
        start = max(sinks, length - self.window + 1)
        first = source.first
        if trim:
            first = max(first, start - self.reserve)
        target = _Layout(min(max(first, sinks), start), sinks, start, length)
        if target == source:
            return None, target
        return [
            *source.slots(target.first, target.start),
            slice(source.reserve, source.reserve + sinks),
            *source.slots(target.start, target.stop),
        ], target

    def _leave_plain(self, batch: int, device: torch.device) -> None:
        """From here on every row has its own slots."""
        layout = self._layout
        kept = torch.cat(
            [
                torch.arange(*pair, device=device)
                for pair in (
                    (layout.first, layout.start),
                    (0, layout.sinks),
                    (layout.start, layout.stop),
                )
            ]
        )
        self.rank = kept.expand(batch, -1)
        self._place = kept.expand(batch, -1)
        self.valid = torch.ones((batch, self.length), dtype=torch.bool, device=device)
        self.plain = False

    def _count_hidden(self, held: int) -> int:
        """Leading slots that no next query sees."""
        return 0 if self.window is None else max(0, held - self.visible)

    def _retain(self, rank: Tensor, place: Tensor, *, trim: bool) -> None:
        """Choose and order the slots ``rank, place [B, n]``: empty, reserve, then visible ones."""
        total = rank.shape[1]
        if self.window is None or total <= self.visible:
            self._keep, self.rank, self._place = None, rank, place
            return
        assert self.valid is not None
        count = self.valid.sum(1, keepdim=True)
        seen = (rank >= 0) & ((rank < self.sinks) | (rank > count - self.window))
        kind = (rank >= 0).to(torch.int8) + seen.to(torch.int8)
        number = min(total, self.visible + self.reserve) if trim else total
        self._keep = kind.sort(dim=1, stable=True).indices[:, total - number :]
        self.rank, self._place = rank.gather(1, self._keep), place.gather(1, self._keep)

    def shown(self, states: Tensor) -> Tensor:
        """The part of ``[B, G, held + chunk, D]`` that this chunk may see."""
        return states[:, :, self._hidden :]

    def retain(self, states: Tensor) -> Tensor:
        """The part of ``[B, G, held + chunk, D]`` that a layer keeps after this chunk."""
        keep = self._keep
        if keep is None:
            return states
        if isinstance(keep, list):
            return torch.cat([states[:, :, part] for part in keep], dim=2)
        index = keep[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)

    def counts(self, removed: int = 0) -> Tensor | None:
        """Real tokens per row ``[B]`` without the last positions; None while rows are alike."""
        return None if self.valid is None else self.valid[:, : self.length - removed].sum(1)

    def check_crop(self, tokens_to_remove: int) -> int:
        """Number of positions to take away.

        Raises:
            InvalidInputError: a positive argument, or tokens that the window needs are gone.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding passes a tensor
        if tokens_to_remove > 0:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): pass a negative number, the tokens to remove"
            )
        tokens = -tokens_to_remove
        if tokens > self.length:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): the cache holds {self.length} tokens only"
            )
        if tokens == 0 or self.window is None:
            return tokens
        if self.rank is None:
            left = self.length - tokens
            lost = self._layout.first > max(left - self.window + 1, min(self.sinks, left))
        else:
            rows, count = self.counts(tokens), self.counts()
            assert rows is not None
            assert count is not None
            # Ranks from here on are needed; those of the sinks are always held.
            need = (rows - self.window + 1).maximum(rows.clamp(max=self.sinks))
            held = (self.rank >= need[:, None]).sum(1)
            lost = bool((held < count - need).any())
        if lost:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): the window cache (window {self.window}, sinks "
                f"{self.sinks}) has already dropped tokens that become visible again; it holds "
                f"{self.reserve} for this. Call cache.activate_past_recording() before the tokens "
                "that may be taken back, or keep a copy.deepcopy of the cache"
            )
        return tokens

    def cropped(self, tokens: int) -> WindowIndex:
        """The index after a crop, whose `retain` maps the layers' states."""
        after = WindowIndex(self.window, self.sinks, self.reserve)
        after.record_past, after.plain = self.record_past, self.plain
        after.length = self.length - tokens
        if self.rank is None:
            after._keep, after._layout = self._plan(self._layout, after.length, trim=True)
            return after
        assert self.valid is not None
        assert self._place is not None
        after.valid = self.valid[:, : after.length]
        rank = self.rank.masked_fill(self._place >= after.length, -1)
        after._retain(rank, self._place, trim=True)
        return after

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        for name in ("valid", "rank", "_place"):
            table = getattr(self, name)
            if table is not None:
                setattr(self, name, table[rows.to(table.device)])
