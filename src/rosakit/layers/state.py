"""Streaming states: what decoding carries from chunk to chunk (semantics 2.3).

Rows count their own unmasked positions, so left padding leaves no trace: position ``p`` of a row
is its ``p``-th real token. Every operation that a generation loop performs on its cache (beam
reorder, crop, batch selection, reset) has its counterpart here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosakit import native, symbols
from rosakit.errors import InvalidInputError
from rosakit.layers.token_match import TokenCandidates
from rosakit.ops.retrieve import values_of_bits
from rosakit.ops.rows import channel_mask
from rosakit.types import NO_MATCH, Match

if TYPE_CHECKING:
    from rosakit.layers.adapter import RosaAdapter


class History:
    """A growing ``[B, W, length]`` table of integers, each row with its own length.

    Args:
        batch: B.
        width: W, entries a position.
        dtype: integer dtype.
        device: where the table lives.
    """

    def __init__(
        self, batch: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.table = torch.zeros((batch, width, 0), dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.table.numel() * self.table.element_size()

    def append(self, chunk: Tensor, mask: Tensor | None) -> Tensor:
        """Add ``chunk [B, W, n]`` where ``mask [B, n]``; returns the row positions ``[B, n]``.

        A masked position gets the position that the next real one will have.
        """
        batch, _, n = chunk.shape
        if mask is None:
            steps = torch.arange(n, device=chunk.device).expand(batch, n)
            added = torch.full((batch,), n, device=chunk.device)
        else:
            real = mask.to(torch.int64)
            steps = real.cumsum(1) - real
            added = real.sum(1)
        position = self.lengths[:, None] + steps
        self._reserve(int((self.lengths + added).max()))
        # Masked positions write to the place that the next real one overwrites; those past the
        # last real one write beyond the row's length, into the spare last column.
        self.table.scatter_(2, position[:, None].expand(-1, chunk.shape[1], -1), chunk)
        if mask is not None:
            # Several writes to one place are unordered, so the real ones are written again.
            rows, columns = mask.nonzero(as_tuple=True)
            self.table[rows, :, position[rows, columns]] = chunk[rows, :, columns]
        self.lengths += added
        return position

    def _reserve(self, length: int) -> None:
        capacity = self.table.shape[2]
        if length + 1 > capacity:
            grown = max(length + 1, 2 * capacity, 64)
            extra = self.table.new_zeros((*self.table.shape[:2], grown - capacity))
            self.table = torch.cat([self.table, extra], dim=2)

    def read(self, position: Tensor) -> Tensor:
        """Entries at ``position [B, W, n]`` (nonnegative)."""
        return self.table.gather(2, position)

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order (beam search)."""
        rows = rows.to(self.table.device)
        self.table, self.lengths = self.table[rows], self.lengths[rows]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths ``[B]``."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths.device))


class AdapterState:
    """What one adapter remembers: the suffix memory of its symbols and its packed value bits.

    Args:
        adapter: the adapter whose options the state follows.
        batch: number of rows.
        device: device of the value history.
    """

    def __init__(self, adapter: RosaAdapter, batch: int, device: torch.device | str) -> None:
        self.bits, self.routes, self.unmatched = adapter.bits, adapter.routes, adapter.unmatched
        self.memory = (
            native.SuffixMemory(
                batch,
                adapter.routes,
                bits=adapter.bits,
                granularity=adapter.granularity,
                successor=adapter.successor,
                max_length=adapter.max_length,
                min_length=adapter.min_length,
            )
            if adapter.address == "learned"
            else None
        )
        # torch neither gathers nor scatters uint16, so wide symbols are kept in int32.
        dtype = torch.uint8 if adapter.bits <= 8 else torch.int32
        self.values = History(batch, adapter.routes, dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes held: automata and value bits."""
        return self.values.nbytes + (0 if self.memory is None else self.memory.nbytes)

    def match(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Match:
        """Match this chunk's symbols ``[B, R, n]`` and remember them."""
        assert self.memory is not None
        found = self.memory.extend(
            q.cpu(), k.cpu(), mask=None if mask is None else mask.to("cpu", torch.bool)
        )
        return Match(found.position.to(q.device), found.length.to(q.device))

    def read(
        self,
        v: Tensor,
        match: Match,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Remember this chunk's values and read the matched ones: ``y [B, n, C]``.

        Args:
            v: ``[B, n, C]``.
            match: positions ``[B, R, n]`` (or ``[B, 1, n]``, shared by the routes).
        """
        packed = symbols.pack(v, self.bits).to(self.values.table.dtype)
        own = self.values.append(packed, mask)
        position = match.position.expand(-1, self.routes, -1).to(torch.int64)
        if self.unmatched == "self":
            position = torch.where(position >= 0, position, own[:, None])
        read = self.values.read(position.clamp(min=0))
        value = symbols.unpack(read, self.bits)
        return values_of_bits(value, channel_mask(position, self.bits), e0, e1, e_null, v.dtype)

    def select(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory = self.memory.index_select(rows.cpu())
        self.values.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        if self.memory is not None:
            self.memory.truncate(lengths.cpu())
        self.values.truncate(lengths)


class TokenState:
    """What the token stream remembers: its suffix memory and its token ids.

    Args:
        batch: number of rows.
        candidates: K of the token route; 1 serves ``address="token"`` alone.
        min_length: shorter matches are left out.
        device: device of the results.
    """

    def __init__(
        self, batch: int, candidates: int, min_length: int, device: torch.device | str
    ) -> None:
        self.candidates = candidates
        self.memory = native.SuffixMemory(batch, 1, symbols="int32", min_length=min_length)
        self.tokens = History(batch, 1, torch.int32, device)

    @property
    def nbytes(self) -> int:
        return int(self.memory.nbytes) + self.tokens.nbytes

    def extend(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Match, TokenCandidates]:
        """Match this chunk ``[B, n]``: the best match ``[B, 1, n]`` and the K candidates."""
        ids = input_ids.to(torch.int32)[:, None].contiguous()
        stream = ids.cpu()
        found = self.memory.extend(
            stream,
            stream,
            mask=None if mask is None else mask.to("cpu", torch.bool),
            candidates=self.candidates,
        )
        position = found.position[:, 0].to(input_ids.device)
        length = found.length[:, 0].to(input_ids.device)
        own = self.tokens.append(ids, mask)
        flat = position.clamp(min=0).to(torch.int64).flatten(1)
        token = self.tokens.read(flat[:, None]).view(position.shape).to(torch.int64)
        valid = position != NO_MATCH
        distance = torch.where(valid, own[..., None] - position, 0).to(torch.int32)
        candidates = TokenCandidates(torch.where(valid, token, 0), length, distance)
        best = Match(position[:, None, :, 0], length[:, None, :, 0])
        return best, candidates

    def select(self, rows: Tensor) -> None:
        self.memory = self.memory.index_select(rows.cpu())
        self.tokens.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        self.memory.truncate(lengths.cpu())
        self.tokens.truncate(lengths)


class RosaStates:
    """All streaming states of a model, as a cache carries them.

    States are created when a module first asks, so the object can be made before the batch size
    is known.

    Attributes:
        lengths: int64 ``[B]``, real tokens seen so far, or None before the first chunk.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        self.token: TokenState | None = None
        self.adapters: dict[int, AdapterState] = {}

    def adapter(self, module: RosaAdapter, batch: int, device: torch.device) -> AdapterState:
        """The state of one adapter."""
        if module.layer_index not in self.adapters:
            self.adapters[module.layer_index] = AdapterState(module, batch, device)
        return self.adapters[module.layer_index]

    def tokens(
        self, batch: int, candidates: int, min_length: int, device: torch.device
    ) -> TokenState:
        """The state of the token stream."""
        if self.token is None:
            self.token = TokenState(batch, candidates, min_length, device)
        return self.token

    def advance(self, batch: int, length: int, mask: Tensor | None) -> None:
        """Count a chunk of ``[B, n]`` positions; call once a forward pass."""
        added = (
            torch.full((batch,), length, dtype=torch.int64)
            if mask is None
            else mask.to("cpu", torch.int64).sum(1)
        )
        if self.lengths is not None and len(self.lengths) != batch:
            raise InvalidInputError(
                f"the cache holds {len(self.lengths)} rows, this chunk has {batch}; "
                "start with a fresh cache or repeat its rows first"
            )
        self.lengths = added if self.lengths is None else self.lengths + added

    @property
    def nbytes(self) -> int:
        """Bytes held by all states."""
        return sum(state.nbytes for state in self._each())

    def select(self, rows: Tensor) -> None:
        """Keep batch rows in the given order (beam search, batch selection, repetition)."""
        if self.lengths is not None:
            self.lengths = self.lengths[rows.cpu()]
        for state in self._each():
            state.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths ``[B]`` of real tokens."""
        if self.lengths is not None:
            self.lengths = torch.minimum(self.lengths, lengths.cpu())
        for state in self._each():
            state.truncate(lengths)

    def reset(self) -> None:
        """Forget everything."""
        self.lengths, self.token = None, None
        self.adapters.clear()

    def _each(self) -> Iterator[AdapterState | TokenState]:
        yield from self.adapters.values()
        if self.token is not None:
            yield self.token
