"""`WindowIndex`: which tokens the windowed layers of a cache hold, decided once for all layers.

Every row's tokens are numbered by rank: its real tokens in order, so padding leaves no trace. A
layer's buffer has three parts, and the slot of a token follows from its rank alone:

* ``0 .. S``: the sinks, rank ``r`` at slot ``r``;
* ``S .. S + W``: a ring of the last ``W`` other tokens, rank ``r`` at ``S + (r - S) mod W``;
* behind them the reserve, a ring of the tokens that left the window last, for rollbacks.

A decode step therefore writes one slot (and moves the token that was there to the reserve),
whatever W is; and once a row is longer than ``S + W``, every slot of the first two parts is visible
to its newest token, so that no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.tuning.window import OUTSIDE, PADDING, Positions

RESERVE = 64
"""Tokens held behind the window, so that a rollback of up to so many (the rejected drafts of
assisted decoding) finds what becomes visible again. They are not attended to."""

EMPTY = -1
"""Rank of a slot that holds no token."""


class Move(NamedTuple):
    """Neighbouring slots that a layer copies: ``buffer[into] = (chunk or buffer)[out]``."""

    from_chunk: bool
    out: slice
    into: slice


class Update(NamedTuple):
    """What each windowed layer does in one forward pass.

    Attributes:
        width: slots in use before the pass.
        slots: slots that the buffer needs after it (a buffer grows with its content).
        before: slots shown together with the chunk; None if the chunk is written first and only
            the buffer is shown.
        shown: slots shown in that case.
        moves: copies in order, where all rows are alike.
        rows: per-row slots of a single new token ``[B, 1]`` (ring, reserve or None), else None.
        gather: per-row sources of all slots in ``[buffer, chunk]`` ``[B or 1, slots]``, else None.
    """

    width: int
    slots: int
    before: int | None
    shown: int
    moves: tuple[Move, ...] = ()
    rows: tuple[Tensor, Tensor | None] | None = None
    gather: Tensor | None = None


class Restored(NamedTuple):
    """What each windowed layer does when tokens are taken back.

    Attributes:
        after: the index afterwards.
        moves: copies in order, where all rows are alike.
        gather: per-row sources of all slots ``[B or 1, slots]``, else None.
    """

    after: WindowIndex
    moves: tuple[Move, ...] = ()
    gather: Tensor | None = None


class WindowIndex:
    """Which tokens the windowed layers of a cache hold.

    As long as no padding was seen (`plain`) all rows are alike and slices suffice; later every row
    has its own ranks.

    Args:
        window: W, the current token included; None if no layer is windowed.
        sink_tokens: S.
        reserve: tokens held for rollbacks; None for `RESERVE`.

    Attributes:
        picked: slots ``[B, n]`` of all keys that the next single query sees, where layers that keep
            all of them recall spans; else None.
        length: positions seen, padding included.
        record_past: nothing is dropped until the next crop.
        valid: bool ``[B, length]``, real positions; None while plain.
        update: what the layers do in the running forward pass.
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
        self.update = Update(0, 0, None, 0)
        self.picked: Tensor | None = None
        # Real tokens of each row, and the first rank past the sinks that is still held; one entry
        # while plain. On the host, so that deciding never waits for a device.
        self._count = torch.zeros(1, dtype=torch.int64)
        self._floor = torch.full((1,), self.sinks, dtype=torch.int64)
        self._room = self.reserve  # slots of the reserve: more of them while the past is recorded

    @property
    def visible(self) -> int:
        """Most slots that a next query can see."""
        return self.sinks + (self.window or 0)

    @property
    def capacity(self) -> int:
        """Slots of a buffer whose window has been filled."""
        return self.visible + self._room

    def counts(self, removed: int = 0) -> Tensor | None:
        """Real tokens per row ``[B]`` without the last positions; None while rows are alike."""
        return None if self.valid is None else self.valid[:, : self.length - removed].sum(1)

    def advance(
        self, mask: Tensor | None, chunk: int, device: torch.device
    ) -> tuple[Positions, Callable[[], Positions], Callable[[], Positions], bool]:
        """Take in a chunk; the layers' updates of this forward pass follow the decision made here.

        Args:
            mask: bool ``[B, chunk]``, real positions; None if all are.
            chunk: number of new positions.

        Returns:
            Positions of the chunk; calls that give those of the windowed layers' keys and those of
            all keys so far; and whether all keys of the windowed layers are visible.

        Raises:
            InvalidInputError: the chunk has another number of rows than the cache.
        """
        if mask is not None and self.plain:
            self._leave_plain(mask.shape[0], device)
        if mask is not None and mask.shape[0] != len(self._count):
            raise InvalidInputError(
                f"the cache holds {len(self._count)} rows, this chunk has {mask.shape[0]}"
            )
        before, start = self._count, self.length
        self.length += chunk
        self._count = before + (chunk if mask is None else mask.to("cpu").sum(1))
        if self.valid is not None:
            real = self.valid.new_ones((len(before), chunk)) if mask is None else mask
            self.valid = torch.cat([self.valid, real], dim=1)
        query = self._query(before, start, mask, chunk, device)
        if self.window is None:
            return query, lambda: query, self._everything(device), False
        self._plan(before, mask, chunk, device)
        single = self.update.before is None
        clear = single and (self.plain or self._uniform())
        return query, self._shown(before, query, device), self._everything(device), clear

    def _query(
        self,
        before: Tensor,
        start: int,
        mask: Tensor | None,
        chunk: int,
        device: torch.device,
    ) -> Positions:
        if self.plain:
            rank = torch.arange(start, start + chunk, device=device)[None]
            return Positions(torch.zeros_like(rank), rank)
        first = before.to(device)[:, None]
        if mask is None:
            rank = first + torch.arange(chunk, device=device)
            return Positions(torch.zeros_like(rank), rank)
        real = mask.to(torch.int64)
        rank = torch.where(mask, first + real.cumsum(1) - real, 0)
        return Positions(torch.where(mask, 0, PADDING), rank)

    def _everything(self, device: torch.device) -> Callable[[], Positions]:
        """Positions of all keys so far, for layers without a window."""
        valid, length = self.valid, self.length

        def full() -> Positions:
            if valid is None:
                rank = torch.arange(length, device=device)[None]
                return Positions(torch.zeros_like(rank), rank)
            rank = torch.where(valid, valid.cumsum(1) - 1, 0)
            return Positions(torch.where(valid, 0, PADDING), rank)

        return full

    def _shown(
        self, before: Tensor, query: Positions, device: torch.device
    ) -> Callable[[], Positions]:
        """Positions of the keys that the windowed layers show in this pass."""
        update, after = self.update, self._count

        def shown() -> Positions:
            if update.before is None:
                rank = self._ranks(after, device)[:, : update.shown]
            else:
                rank = self._ranks(before, device)[:, : update.before]
            held = Positions(torch.where(rank >= 0, 0, OUTSIDE), rank.clamp(min=0))
            if update.before is None:
                return held
            return Positions(*(torch.cat(pair, 1) for pair in zip(held, query, strict=True)))

        return shown

    def _uniform(self) -> bool:
        """Whether no row has an empty slot that another row fills."""
        shortest, longest = int(self._count.min()), int(self._count.max())
        return shortest == longest or shortest >= self.visible

    def _ranks(self, count: Tensor, device: torch.device) -> Tensor:
        """Rank of the token in each visible slot ``[B or 1, S + W]`` after `count` tokens."""
        assert self.window is not None
        slot = torch.arange(self.visible, device=device)
        last = count.to(device)[:, None] - 1
        ring = last - (last - slot) % self.window
        rank = torch.where(slot < self.sinks, slot, ring)
        return torch.where(
            (rank > last) | ((slot >= self.sinks) & (rank < self.sinks)), EMPTY, rank
        )

    def _plan(self, before: Tensor, mask: Tensor | None, chunk: int, device: torch.device) -> None:
        """Decide the layers' update."""
        assert self.window is not None
        window, room = self.window, self._room
        evicted = self._count - window  # ranks below are no longer in the ring
        if self.record_past:
            self._room = max(room, int((evicted - self._floor).max()))
        self._floor = self._floor.maximum(evicted - self._room)
        longest, width = int(self._count.max()), int(before.max())
        slots = self._slots(longest, self._room)
        held = min(width, self.visible)
        single = chunk == 1 and mask is None
        update = Update(
            self._slots(width, room), slots, None if single else held, min(longest, self.visible)
        )
        if self._room != room or (not self.plain and not single):
            gather = self._sources(before, mask, room, chunk, update, device)
            self.update = update._replace(before=held, gather=gather)
        elif self.plain:
            self.update = update._replace(moves=tuple(self._moves(int(before[0]), longest)))
        else:
            newest = self._count.to(device)[:, None] - 1
            leaving = (newest - window - self.sinks) % max(room, 1) + self.visible
            self.update = update._replace(
                rows=(
                    self._slot(newest),
                    leaving if longest > self.visible and room else None,
                )
            )

    def _slots(self, longest: int, room: int) -> int:
        """Slots in use when the longest row has so many tokens."""
        return longest if longest <= self.visible else self.visible + room

    def _slot(self, rank: Tensor) -> Tensor:
        """Where a rank is while it is visible."""
        assert self.window is not None
        return torch.where(rank < self.sinks, rank, self.sinks + (rank - self.sinks) % self.window)

    def _moves(self, before: int, after: int) -> list[Move]:
        """Copies that take in ranks ``before .. after`` where all rows are alike."""
        assert self.window is not None
        sinks, window, room = self.sinks, self.window, self._room
        out = []
        evicted = after - window
        kept = max(sinks, evicted - room)

        def copy(begin: int, end: int, from_chunk: bool, to_reserve: bool) -> None:
            """Ranks ``begin .. end`` past the sinks, cut where a ring begins anew."""
            while begin < end:
                stop = end
                if not from_chunk:
                    stop = min(stop, begin + window - (begin - sinks) % window)
                ring, base = (room, self.visible) if to_reserve else (window, sinks)
                stop = min(stop, begin + ring - (begin - sinks) % ring)
                source = begin - before if from_chunk else sinks + (begin - sinks) % window
                target = base + (begin - sinks) % ring
                size = stop - begin
                out.append(
                    Move(from_chunk, slice(source, source + size), slice(target, target + size))
                )
                begin = stop

        # First what leaves the ring, before its slots are written.
        copy(max(kept, before - window), min(before, evicted), False, True)
        copy(max(kept, before), evicted, True, True)
        copy(max(sinks, before, evicted), after, True, False)
        if before < sinks:
            end = min(sinks, after)
            out.append(Move(True, slice(0, end - before), slice(before, end)))
        return out

    def _sources(
        self,
        before: Tensor,
        mask: Tensor | None,
        room: int,
        chunk: int,
        update: Update,
        device: torch.device,
    ) -> Tensor:
        """For every slot after the chunk its source in ``[old buffer, chunk]``."""
        assert self.window is not None
        count, floor, old = (x.to(device)[:, None] for x in (self._count, self._floor, before))
        rank = self._all_ranks(count, floor, self._room, update.slots, device)
        number = rank - old  # of the chunk's real tokens
        if mask is None:
            place = number
        else:
            place = torch.searchsorted(mask.to(torch.int64).cumsum(1), number + 1)
        from_old = self._held_slot(rank, old, room)
        source = torch.where(number >= 0, update.width + place, from_old)
        return source.clamp(0, update.width + chunk - 1)

    def _all_ranks(
        self, count: Tensor, floor: Tensor, room: int, slots: int, device: torch.device
    ) -> Tensor:
        """Ranks of all slots, the reserve included ``[B, slots]``; `EMPTY` where there is none."""
        assert self.window is not None
        rank = self._ranks(count[:, 0], device)[:, :slots]
        if slots <= self.visible:
            return rank
        slot = torch.arange(slots - self.visible, device=device)
        last = count - self.window - 1
        reserve = last - (last - self.sinks - slot) % room
        reserve = torch.where((reserve < floor) | (reserve > last), EMPTY, reserve)
        return torch.cat([rank, reserve], dim=1)

    def _held_slot(self, rank: Tensor, count: Tensor, room: int) -> Tensor:
        """Slot of a held rank when `count` tokens have been seen."""
        assert self.window is not None
        reserve = self.visible + (rank - self.sinks) % max(room, 1)
        gone = (rank >= self.sinks) & (rank < count - self.window)
        return torch.where(gone, reserve, self._slot(rank))

    def _leave_plain(self, batch: int, device: torch.device) -> None:
        """From here on every row has its own ranks."""
        self._count, self._floor = self._count.repeat(batch), self._floor.repeat(batch)
        self.valid = torch.ones((batch, self.length), dtype=torch.bool, device=device)
        self.plain = False

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
        left = self._left(tokens)
        first = (left - self.window + 1).clamp(min=self.sinks)
        if bool((first < torch.minimum(self._floor, left)).any()):
            raise InvalidInputError(
                f"crop({tokens_to_remove}): the window cache (window {self.window}, sinks "
                f"{self.sinks}) has already dropped tokens that become visible again; it holds "
                f"{self.reserve} for this. Call cache.activate_past_recording() before the tokens "
                "that may be taken back, or keep a copy.deepcopy of the cache"
            )
        return tokens

    def _left(self, tokens: int) -> Tensor:
        counts = self.counts(tokens)
        return self._count - tokens if counts is None else counts.cpu()

    def cropped(self, tokens: int, device: torch.device) -> Restored:
        """What taking back the last positions does to the index and its layers."""
        after = WindowIndex(self.window, self.sinks, self.reserve)
        after.record_past, after.plain = self.record_past, self.plain
        after.length = self.length - tokens
        after._count = self._left(tokens)
        after.valid = None if self.valid is None else self.valid[:, : after.length]
        if self.window is None:
            return Restored(after)
        after._floor = self._floor.maximum(after._count - self.window - after._room)
        longest, left = int(self._count.max()), int(after._count.max())
        if longest <= self.visible or (tokens == 0 and after._room == self._room):
            return Restored(after)  # nothing has left its place
        if self.plain and after._room == self._room:
            first = max(left - self.window, int(self._floor[0]))
            return Restored(after, tuple(self._restore(first, longest - self.window)))
        count, floor, before = (
            x.to(device)[:, None] for x in (after._count, after._floor, self._count)
        )
        rank = self._all_ranks(count, floor, after._room, self._slots(left, after._room), device)
        source = self._held_slot(rank, before, self._room)
        return Restored(after, gather=source.clamp(0, self.capacity - 1))

    def _restore(self, begin: int, end: int) -> Iterator[Move]:
        """Copies of ranks ``begin .. end`` from the reserve into the ring."""
        assert self.window is not None
        while begin < end:
            source, target = (begin - self.sinks) % self._room, (begin - self.sinks) % self.window
            size = min(end - begin, self._room - source, self.window - target)
            source, target = source + self.visible, target + self.sinks
            yield Move(False, slice(source, source + size), slice(target, target + size))
            begin += size

    def facts(self) -> dict[str, Any]:
        """Everything but `valid` as plain values, for `restore`."""
        return {
            "length": self.length,
            "plain": self.plain,
            "count": self._count.tolist(),
            "floor": self._floor.tolist(),
            "room": self._room,
            "record_past": self.record_past,
        }

    def restore(self, facts: dict[str, Any]) -> None:
        """Become the index that `facts` came from; `valid` is set beside it."""
        self.length, self.plain = int(facts["length"]), bool(facts["plain"])
        self._count, self._floor = (torch.tensor(facts[name]) for name in ("count", "floor"))
        self._room, self.record_past = int(facts["room"]), bool(facts["record_past"])

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        if self.valid is not None:
            self.valid = self.valid[rows.to(self.valid.device)]
            self._count, self._floor = self._count[rows.cpu()], self._floor[rows.cpu()]
