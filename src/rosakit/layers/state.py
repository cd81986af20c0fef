"""Streaming states: what decoding carries from chunk to chunk (semantics 2.3).

Rows count their own unmasked positions, so left padding leaves no trace: position ``p`` of a row
is its ``p``-th real token. Every operation that a generation loop performs on its cache (beam
reorder, crop, batch selection, reset) has its counterpart here.

States live in host memory, beside the suffix memories that the C++ core keeps there, so the
device holds nothing that grows with the context (but for states that lie on a GPU, see
`rosakit.layers.device_state`). A chunk costs one transfer to the host (the bits
of q, k and v together) and one back (the value bits that were read).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rosakit import native, symbols
from rosakit.errors import InvalidInputError
from rosakit.layers.device_state import DeviceState, positions_on_device
from rosakit.layers.graphs import outside_graphs
from rosakit.layers.history import History
from rosakit.layers.projection import WeightCopies, version_of
from rosakit.layers.token_match import TokenCandidates
from rosakit.layers.token_states import CodeState, FarState, RecentTokens
from rosakit.types import Match

if TYPE_CHECKING:
    from rosakit.layers.adapter import RosaAdapter
    from rosakit.layers.exact import ExactMatches

Array = npt.NDArray[Any]

_SMALL = 64
"""Positions up to which bits are packed and unpacked on the host, where that costs less than the
launches on a device; longer chunks pack first and move fewer bytes."""

_RAW = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a floating dtype, for numpy, which lacks bfloat16."""


class AdapterState:
    """What one adapter remembers: the suffix memory of its symbols and its packed value bits.

    Args:
        adapter: the adapter whose options the state follows.
        batch: number of rows.
    """

    def __init__(self, adapter: RosaAdapter, batch: int) -> None:
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
            if adapter.learns_address
            else None
        )
        self.values = History(batch, adapter.routes, np.uint8 if adapter.bits <= 8 else np.uint16)
        self.keys = (
            None
            if adapter.selection is None
            else History(batch, 2 * adapter.selection.width, np.int32)
        )
        self._cached: tuple[tuple[Any, ...], list[Array]] | None = None

    @classmethod
    def moved(cls, adapter: RosaAdapter, state: DeviceState) -> AdapterState:
        """The same state in host memory."""
        (q, k, value), real = state.history()
        made = cls(adapter, len(real))
        if real.shape[1]:
            assert made.memory is not None
            made.memory.extend(q.numpy(), k.numpy(), mask=real.numpy())
            made.values.append(value.numpy(), real.numpy())
        return made

    @property
    def nbytes(self) -> int:
        """Bytes held: automata and value bits."""
        parts = (self.values, self.memory, self.keys)
        return sum(int(part.nbytes) for part in parts if part is not None)

    @outside_graphs
    def extend(
        self,
        channels: list[Tensor],
        match: Match | None,
        mask: Tensor | None,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
        *,
        joined: Tensor | None = None,
    ) -> tuple[Tensor, Match]:
        """Take in a chunk: match its queries, remember its keys and values, read what matched.

        Args:
            channels: q, k and v, ``[B, n, C]`` each; v alone with a given match.
            match: positions ``[B, R, n]`` in host memory, or ``[B, 1, n]`` that all routes share;
                None to match q against the keys.
            mask: bool ``[B, n]``, real positions; None if all are.
            e0: ``[C]``, value of a 0 bit.
            e1: ``[C]``, value of a 1 bit.
            e_null: ``[C]``, value where nothing matched, or None for zero.
            joined: the channels side by side ``[B, n, 3 C]``, if they are views of one tensor.

        Returns:
            ``y [B, n, C]`` on the channels' device and the match in host memory.
        """
        v = channels[-1]
        streams = self._symbols(channels, joined)
        kept = None if mask is None else mask.to("cpu", torch.bool).numpy()
        if match is None:
            assert self.memory is not None
            found = self.memory.extend(streams[0], streams[1], mask=kept)
            match = Match(torch.as_tensor(found.position), torch.as_tensor(found.length))
        position: Array = match.position.numpy().astype(np.int64)
        own = self.values.append(streams[-1], kept)
        if position.shape[1] != self.routes:
            position = np.broadcast_to(position, (len(position), self.routes, position.shape[2]))
        null = position < 0
        if self.unmatched == "self":
            position, null = np.where(null, own[:, None], position), np.zeros_like(null)
        read = self.values.read(np.where(position < 0, 0, position))
        return self._values(read, null, v, e0, e1, e_null), match

    @outside_graphs
    def candidate_keys(
        self, keys: Tensor, position: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Remember a chunk's selection keys; those of its candidates.

        Args:
            keys: float32 ``[B, n, 2 W]``, without gradient.
            position: ``[B, K, n]`` in host memory, negative where there is no candidate.
            mask: bool ``[B, n]``, real positions; None if all are.

        Returns:
            ``[B, K, n, 2 W]`` as `rosakit.layers.selection.Selection.gather` has them, and the
            distances ``[B, K, n]``.
        """
        assert self.keys is not None
        batch, count, n = position.shape
        raw = keys.detach().cpu().contiguous().view(torch.int32).numpy().transpose(0, 2, 1)
        own = self.keys.append(raw, None if mask is None else mask.to("cpu", torch.bool).numpy())
        place = position.numpy().astype(np.int64)
        read = np.maximum(place, 0).reshape(batch, 1, -1)
        half = keys.shape[-1] // 2
        both = np.concatenate(
            [np.repeat(read, half, 1), np.repeat(np.maximum(read - 1, 0), half, 1)], 1
        )
        picked = torch.from_numpy(self.keys.read(both)).view(torch.float32)
        picked = picked.view(batch, -1, count, n).permute(0, 2, 3, 1).contiguous()
        distance = torch.from_numpy(own[:, None] - place)
        return picked.to(keys.device), distance.to(keys.device)

    def _symbols(self, channels: list[Tensor], joined: Tensor | None) -> list[Array]:
        """Symbols ``[B, R, n]`` of each, in host memory."""
        if channels[0].shape[1] > _SMALL:
            packed = torch.stack([symbols.pack(x, self.bits) for x in channels])
            return list(packed.cpu().numpy())
        if joined is None:
            joined = channels[0] if len(channels) == 1 else torch.cat(channels, dim=-1)
        return self._pack(symbols.binarize(joined).cpu().numpy(), len(channels))

    def _pack(self, sign: Array, parts: int) -> list[Array]:
        """Symbols ``[B, R, n]`` of each part of ``sign [B, n, parts * C]``."""
        batch, length, _ = sign.shape
        weight = (1 << np.arange(self.bits)).astype(self.values.table.dtype)
        packed = sign.reshape(batch, length, parts, self.routes, self.bits) @ weight
        return [np.ascontiguousarray(packed[:, :, i].transpose(0, 2, 1)) for i in range(parts)]

    def _values(
        self,
        read: Array,
        null: Array,
        v: Tensor,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
    ) -> Tensor:
        """``y [B, n, C]`` of the symbols read ``[B, R, n]``; `null` where nothing was."""
        missing: Tensor | None
        if v.shape[1] > _SMALL:
            bit = symbols.unpack(torch.from_numpy(read).to(v.device), self.bits)
            missing = torch.from_numpy(null).to(v.device).transpose(1, 2)
            missing = missing.repeat_interleave(self.bits, dim=-1) if null.any() else None
        elif not (torch.is_grad_enabled() and e0.requires_grad):
            return self._host_values(read, null, v, e0, e1, e_null)
        else:
            bit = symbols.unpack(torch.from_numpy(read).to(v.device), self.bits)
            missing = torch.from_numpy(null).to(v.device).transpose(1, 2)
            missing = missing.repeat_interleave(self.bits, dim=-1)
        y = torch.where(bit, e1.to(v.dtype), e0.to(v.dtype))
        if missing is None:
            return y
        fill = y.new_zeros(()) if e_null is None else e_null.to(v.dtype)
        return torch.where(missing, fill, y)

    def _host_values(
        self,
        read: Array,
        null: Array,
        v: Tensor,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
    ) -> Tensor:
        """`_values` put together on the host: one transfer and no kernel."""
        zero, one, fill = self._levels(v, e0, e1, e_null)
        shifts = np.arange(self.bits, dtype=read.dtype)
        bit = ((read.transpose(0, 2, 1)[..., None] >> shifts) & 1).astype(np.bool_)
        y = np.where(bit, one, zero)
        if null.any():
            y = np.where(null.transpose(0, 2, 1)[..., None], fill, y)
        return torch.from_numpy(y.reshape(v.shape)).view(v.dtype).to(v.device)

    def _levels(self, v: Tensor, e0: Tensor, e1: Tensor, e_null: Tensor | None) -> list[Array]:
        """e0, e1 and e_null in host memory, ``[R, M]`` raw numbers of the dtype of `v`."""
        given = [e0, e1, torch.zeros_like(e0) if e_null is None else e_null]
        name = (v.dtype, *(version_of(x) for x in given[: 2 + (e_null is not None)]))
        if self._cached is None or self._cached[0] != name:
            raw = _RAW[v.dtype.itemsize]
            levels = [x.detach().to("cpu", v.dtype).view(raw).numpy() for x in given]
            self._cached = (name, [x.reshape(self.routes, self.bits) for x in levels])
        return self._cached[1]

    def select(self, rows: Tensor) -> None:
        if self.memory is not None:
            self.memory = self.memory.index_select(rows.cpu())
        self.values.select(rows)
        if self.keys is not None:
            self.keys.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        if self.memory is not None:
            self.memory.truncate(lengths.cpu())
        self.values.truncate(lengths)
        if self.keys is not None:
            self.keys.truncate(lengths)


class TokenState:
    """What the token stream remembers: its suffix memory and its token ids.

    Args:
        batch: number of rows.
        candidates: K of the token route; 1 serves ``address="token"`` alone.
        min_length: shorter matches are left out.
    """

    def __init__(self, batch: int, candidates: int, min_length: int) -> None:
        self.candidates = candidates
        self.memory = native.SuffixMemory(batch, 1, symbols="int32", min_length=min_length)
        self.tokens = History(batch, 1, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held: automaton and token ids."""
        return int(self.memory.nbytes) + self.tokens.nbytes

    @outside_graphs
    def extend(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Match, TokenCandidates]:
        """Match this chunk ``[B, n]``.

        Returns:
            The K best matches ``[B, K, n]`` in host memory, and what follows them on the ids'
            device.
        """
        stream: Array = input_ids.to("cpu", torch.int32).numpy()[:, None]
        kept = None if mask is None else mask.to("cpu", torch.bool).numpy()
        found = self.memory.extend(stream, stream, mask=kept, candidates=self.candidates)
        position, length = (np.asarray(x)[:, 0] for x in (found.position, found.length))
        own = self.tokens.append(stream, kept)
        there = position >= 0
        places = np.where(there, position, 0)
        token = self.tokens.read(places.reshape(len(places), 1, -1)).reshape(position.shape)
        distance = np.where(there, own[..., None] - position, 0)
        facts = np.stack([np.where(there, token, 0), length, distance]).astype(np.int32)
        moved = torch.from_numpy(facts).to(input_ids.device)
        best = Match(*(torch.from_numpy(x.transpose(0, 2, 1).copy()) for x in (position, length)))
        return best, TokenCandidates(moved[0].to(torch.int64), moved[1], moved[2])

    @outside_graphs
    def at(self, position: Tensor) -> Tensor:
        """Token ids int64 at ``position [B, K, n]`` (nonnegative), both in host memory."""
        place = position.cpu().numpy()
        found = self.tokens.read(place.reshape(len(place), 1, -1)).reshape(place.shape)
        return torch.from_numpy(found.astype(np.int64))

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
        copies: the adapters' weights as decoding reads them; no state, not in `nbytes`.
    """

    def __init__(self) -> None:
        self.copies = WeightCopies()
        self.lengths: Tensor | None = None
        self.token: TokenState | None = None
        self.adapters: dict[int, AdapterState | DeviceState] = {}
        self.recent: RecentTokens | None = None
        self.far: FarState | None = None
        self.coded: dict[Hashable, CodeState] = {}
        self._room: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def adapter(self, module: RosaAdapter, batch: int) -> AdapterState:
        """The state of one adapter, in host memory: moved there if it was on the device."""
        state = self.adapters.get(module.layer_index)
        if state is None:
            state = AdapterState(module, batch)
        elif isinstance(state, DeviceState):
            state = AdapterState.moved(module, state)
        self.adapters[module.layer_index] = state
        return state

    def growing(self, module: RosaAdapter, batch: int, more: int) -> AdapterState | DeviceState:
        """The state of one adapter, where the next `more` positions are best added.

        On the device as far as `positions_on_device` allows, then in host memory.
        """
        state = self.adapters.get(module.layer_index)
        if isinstance(state, AdapterState):
            return state
        limit = positions_on_device(module, batch)
        if limit is not None and (0 if state is None else state.length) + more > limit:
            return self.adapter(module, batch)
        if state is None:
            state = self.adapters[module.layer_index] = DeviceState(module, batch)
        state.bound = (module.backend, limit)
        return state

    def room(self, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what lies between the launches of a step; the layers use it in turn."""
        held = self._room.get((device, dtype))
        if held is None or held.numel() < numbers:
            held = torch.empty(max(numbers, 4096), dtype=dtype, device=device)
            self._room[device, dtype] = held
        return held

    def settle(self, modules: Iterable[RosaAdapter]) -> None:
        """Bring every state to host memory, as saving wants it."""
        for module in modules:
            state = self.adapters.get(module.layer_index)
            if isinstance(state, DeviceState):
                self.adapters[module.layer_index] = AdapterState.moved(module, state)

    def tokens(self, batch: int, candidates: int, min_length: int) -> TokenState:
        """The state of the token stream."""
        if self.token is None:
            self.token = TokenState(batch, candidates, min_length)
        return self.token

    def recent_tokens(self, batch: int) -> RecentTokens:
        """The tokens that hash codes look back at."""
        if self.recent is None:
            self.recent = RecentTokens(batch)
        return self.recent

    def far_tokens(self, batch: int, distance: int) -> FarState:
        """The token stream whose keys arrive late."""
        if self.far is None:
            self.far = FarState(batch, distance)
        return self.far

    def codes(self, exact: ExactMatches, batch: int) -> CodeState:
        """The memory of fixed hash codes, shared by the adapters with equal ones."""
        if exact.name not in self.coded:
            self.coded[exact.name] = CodeState(exact, batch)
        return self.coded[exact.name]

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
        self.lengths, self.token, self.recent, self.far = None, None, None, None
        self.adapters.clear()
        self.coded.clear()
        self.copies.clear()
        self._room.clear()

    def _each(
        self,
    ) -> Iterator[AdapterState | DeviceState | TokenState | RecentTokens | FarState | CodeState]:
        yield from self.adapters.values()
        yield from self.coded.values()
        for state in (self.token, self.recent, self.far):
            if state is not None:
                yield state
