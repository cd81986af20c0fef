"""Streaming states: what the recurrent mode of an RWKV-8 ROSA model carries from step to step.

Semantics 2.3: any split of a sequence into chunks gives the numbers of one whole-sequence call.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rosakit import native, symbols
from rosakit.errors import InvalidInputError, warn_once
from rosakit.layers.history import History
from rosakit.ops import suffix_match


class MatchStream:
    """Streaming suffix match of ``B x R`` streams of symbols.

    The compiled core's suffix memory does the work where it is there; without it the symbols seen
    so far are kept and matched again at every step, with one warning.

    Args:
        batch: B.
        routes: R.
        bits: bits a symbol; None for token ids.
        device: device of the results.
    """

    def __init__(
        self, batch: int, routes: int, bits: int | None, device: torch.device | str
    ) -> None:
        self._memory = native.SuffixMemory(batch, routes, bits=bits) if native.available() else None
        if self._memory is None:
            warn_once(
                "rosakit: the compiled core is missing, so recurrent steps match the whole "
                "history again; reinstall rosakit with a C++ compiler for the fast path"
            )
        dtype = torch.int32 if bits is None else symbols.symbol_dtype(bits)
        self._seen = torch.empty((2, batch, routes, 0), dtype=dtype, device=device)

    def extend(self, q: Tensor, k: Tensor) -> Tensor:
        """Positions ``[B, R, n]`` (int32, -1 for no match) of the next symbols ``[B, R, n]``."""
        if self._memory is not None:
            found = self._memory.extend(q.cpu(), k.cpu())
            position: Tensor = found.position.to(q.device)
            return position
        self._seen = torch.cat([self._seen, torch.stack([q, k])], dim=-1)
        return suffix_match(self._seen[0], self._seen[1]).position[..., -q.shape[-1] :]

    def select(self, rows: Tensor) -> None:
        """Keep batch rows in the given order."""
        if self._memory is not None:
            self._memory = self._memory.index_select(rows.cpu())
        self._seen = self._seen[:, rows.to(self._seen.device)]


class RosaState:
    """What one ROSA operator remembers: its streams and the values that may be read.

    Args:
        batch: B.
        width: R, number of streams.
        bits: bits a symbol; None for token ids.
        device: device of the results.
    """

    def __init__(
        self, batch: int, width: int, bits: int | None, device: torch.device | str
    ) -> None:
        self.stream = MatchStream(batch, width, bits, device)
        dtype = np.int32 if bits is None else np.uint8 if bits <= 8 else np.uint16
        self.values = History(batch, width, dtype)

    def extend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember symbols ``[B, R, n]`` and read: the value symbols and where one was matched.

        Returns:
            ``(value, matched)``, both ``[B, R, n]``; a value is arbitrary where nothing matched.
        """
        position = self.stream.extend(q, k)
        self.values.append(v.cpu().numpy(), None)
        value = self.values.read(position.clamp(min=0).cpu().numpy())
        return torch.from_numpy(value).to(v.device), position >= 0

    def select(self, rows: Tensor) -> None:
        self.stream.select(rows)
        self.values.select(rows)


class State:
    """The recurrent state of a model: one entry a stateful layer, made when it is first used.

    Args:
        batch: number of rows B.

    Attributes:
        length: tokens seen so far, the same for all rows.
    """

    def __init__(self, batch: int) -> None:
        if batch < 1:
            raise InvalidInputError(f"a state needs at least one row, got batch={batch}")
        self.batch = batch
        self.length = 0
        self._tensors: dict[str, Tensor] = {}
        self._streams: dict[str, RosaState] = {}

    def check(self, tokens: Tensor) -> None:
        """Refuse tokens of another batch size."""
        if tokens.shape[0] != self.batch:
            raise InvalidInputError(
                f"the state holds {self.batch} rows but tokens have {tokens.shape[0]}; make a "
                "state of that size with init_state, or select its rows first"
            )

    def swap(self, name: str, new: Tensor) -> Tensor | None:
        """Store a tensor and return the one it replaces (None at the start)."""
        old = self._tensors.get(name)
        self._tensors[name] = new
        return old

    def get(self, name: str) -> Tensor | None:
        """The tensor stored under a name, None at the start."""
        return self._tensors.get(name)

    def rosa(
        self, name: str, width: int, bits: int | None, device: torch.device | str
    ) -> RosaState:
        """The state of the ROSA operator of that name."""
        if name not in self._streams:
            self._streams[name] = RosaState(self.batch, width, bits, device)
        return self._streams[name]

    def select(self, rows: Tensor | list[int]) -> None:
        """Keep batch rows in the given order, repeated ones included (beam search)."""
        order = torch.as_tensor(rows, dtype=torch.int64)
        if order.dim() != 1 or not len(order):
            raise InvalidInputError(f"rows must be a non-empty list of indices, got {rows}")
        if int(order.min()) < 0 or int(order.max()) >= self.batch:
            raise InvalidInputError(f"rows must be in 0..{self.batch - 1}, got {order.tolist()}")
        self.batch = len(order)
        self._tensors = {name: x[order.to(x.device)] for name, x in self._tensors.items()}
        for stream in self._streams.values():
            stream.select(order)

    def fork(self) -> State:
        """An independent copy."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        twin = State(self.batch)
        twin.length = self.length
        twin._tensors = dict(self._tensors)  # entries are replaced, never written into
        twin._streams = copy.deepcopy(self._streams, memo)
        return twin
