"""`StreamMemory`: the streaming state of suffix matching in GPU memory (semantics 2.3).

Where the CPU's memory keeps an index, this one keeps for every lag the length of the current run
and passes over all of them at every step: more work, but memory bandwidth is what a GPU has, and a
step needs no transfer and no synchronisation. `docs/guides/backends.md` says which is faster when.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rosakit.cuda import compile, matcher
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.types import NO_MATCH, Match

_KERNELS = ("extend_streams", "rebuild_runs")
_THREADS = 512
STEPS = 8
"""Chunks up to this length go symbol by symbol; longer ones through the whole-sequence matcher."""
BYTES_A_SYMBOL = 6
"""State of one symbol of one stream: its query, its key and the run at its lag."""


class StreamMemory:
    """State of ``B x R`` streams that match their queries against their own past keys.

    Rows count their own unmasked symbols; positions are per row, as `rosakit.native.SuffixMemory`.
    Nothing here waits for the device.

    Args:
        batch: B.
        routes: R.
        bits: bits a symbol, 1..8.
        max_length: longer matches count as this long; None for no limit.
        min_length: a shorter best match is no match.
        device: a CUDA device.

    Raises:
        InvalidInputError: an option out of range.
    """

    def __init__(
        self,
        batch: int,
        routes: int,
        *,
        bits: int,
        max_length: int | None = None,
        min_length: int = 1,
        device: torch.device | str = "cuda",
    ) -> None:
        if not 1 <= bits <= 8:
            raise InvalidInputError(
                f"bits must be in 1..8 for streams on a GPU, got {bits}; use rosakit.native."
                "SuffixMemory for wider symbols"
            )
        if batch < 1 or routes < 1 or min_length < 1 or (max_length or 1) < 1:
            raise InvalidInputError(
                "batch, routes, min_length and max_length must be at least 1, got "
                f"{batch}, {routes}, {min_length} and {max_length}"
            )
        self.routes, self.bits = routes, bits
        self.max_length, self.min_length = max_length, min_length
        self.device = torch.device(device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.queries, self.keys = (
            torch.empty((batch, routes, 0), dtype=torch.uint8, device=device) for _ in range(2)
        )
        self.runs = torch.empty((batch, routes, 0), dtype=torch.int32, device=device)
        self._most = 0  # a bound of the lengths that the host knows
        self._ragged = False  # whether rows may differ in length

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory held."""
        return BYTES_A_SYMBOL * self.keys.numel()

    def extend(self, q: Tensor, k: Tensor, *, mask: Tensor | None = None) -> Match:
        """Match a chunk of symbols and remember it: what one whole-sequence match would say.

        Args:
            q, k: uint8 ``[B, R, n]`` on the memory's device.
            mask: bool ``[B, n]``: False leaves a symbol out (padding); it gets -1 and length 0.

        Returns:
            int32 position and length ``[B, R, n]``, on the device.

        Raises:
            InvalidTypeError, InvalidInputError: tensors that do not fit.
        """
        self._check(q, k, mask)
        n = q.shape[2]
        self._reserve(self._most + n)
        if mask is not None:
            mask, self._ragged = mask.to(self.device, torch.bool), True
        small = n <= STEPS or self._most + n > matcher.MAX_POSITIONS
        return self._step(q, k, mask) if small else self._whole(q, k, mask)

    def _step(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Match:
        position = torch.empty(q.shape, dtype=torch.int32, device=self.device)
        length = torch.empty_like(position)
        _, routes, n = q.shape
        if q.numel():
            kept = None if mask is None else mask.to(torch.uint8).contiguous()
            self._launch(
                "extend_streams",
                [
                    *(q.contiguous(), k.contiguous(), kept),
                    *(self.queries, self.keys, self.runs, self.lengths),
                    *(position, length),
                ],
                [routes, n],
                [self.max_length or 0xFFFFFFFF, self.min_length],
            )
        self._grow(n, mask)
        return Match(position, length)

    def _whole(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Match:
        """The whole history once more, by the matcher; then the runs of the newest position."""
        batch, routes, n = q.shape
        own, place = self.places(self.lengths, self._most, n, mask)
        index = place[:, None].expand(batch, routes, n)
        self.queries.scatter_(2, index, q)
        self.keys.scatter_(2, index, k)
        self._grow(n, mask)
        starts = None
        if self._ragged:
            column = torch.arange(self._most, device=self.device)
            starts = torch.where(column < self.lengths[:, None], 0, -1).to(torch.int32)
        position, length, _ = matcher.match(
            self.queries[..., : self._most].contiguous(),
            self.keys[..., : self._most].contiguous(),
            max_length=self.max_length,
            min_length=self.min_length,
            segment_starts=starts,
        )
        index = own.clamp(max=self._most - 1)[:, None].expand(batch, routes, n)
        position, length = position.gather(2, index), length.gather(2, index)
        if mask is not None:
            position = position.masked_fill(~mask[:, None], NO_MATCH)
            length = length.masked_fill(~mask[:, None], 0)
        self._rebuild()
        return Match(position, length)

    def places(
        self, lengths: Tensor, most: int, n: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Row positions of a chunk ``[B, n]``, and the columns of a table to write it to.

        A masked position gets the position of the next real one, and a column that no row reaches.

        Args:
            lengths, most: of the memory before the chunk.
        """
        if mask is None:
            own = lengths[:, None] + torch.arange(n, device=self.device)
            return own, own
        real = mask.to(self.device, torch.int64)
        own = lengths[:, None] + real.cumsum(1) - real
        return own, torch.where(real > 0, own, most + n)

    @property
    def most(self) -> int:
        """A bound of the rows' lengths, known without asking the device."""
        return self._most

    def _grow(self, n: int, mask: Tensor | None) -> None:
        self.lengths = self.lengths + (n if mask is None else mask.sum(1))
        self._most += n

    def _rebuild(self) -> None:
        if self.keys.numel():
            self._launch(
                "rebuild_runs",
                [self.queries, self.keys, self.runs, self.lengths],
                [self.routes],
                [self.max_length or 0xFFFFFFFF],
            )

    def _launch(
        self, name: str, tensors: list[Tensor | None], before: list[int], after: list[int]
    ) -> None:
        with torch.cuda.device(self.device):
            kernel = compile.load(("stream.cu",), _KERNELS, {}, self.device)[name]
            arguments = [compile.pointer(x) for x in tensors]
            arguments += [compile.unsigned(x) for x in before]
            arguments += [(self.keys.shape[2], ctypes.c_size_t)]
            arguments += [compile.unsigned(x) for x in after]
            streams = self.keys.shape[0] * self.routes
            kernel.launch((streams, 1, 1), _THREADS, 0, arguments)

    def _reserve(self, length: int) -> None:
        """Room for `length` symbols and a spare column; half as much again when it grows."""
        capacity = self.keys.shape[2]
        if length < capacity:
            return
        grown = max(length + 1, capacity + capacity // 2, 256)
        extra = -(-grown // 16) * 16 - capacity
        for name in ("queries", "keys", "runs"):
            held = getattr(self, name)
            setattr(self, name, torch.nn.functional.pad(held, (0, extra)))

    def _check(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        expected = [len(self.lengths), self.routes]
        if q.dim() != 3 or list(q.shape[:2]) != expected or q.shape != k.shape:
            raise InvalidInputError(
                f"q and k must have shape [B, R, n] with [B, R] = {expected}, got "
                f"{list(q.shape)} and {list(k.shape)}"
            )
        if q.dtype != torch.uint8 or k.dtype != torch.uint8:
            raise InvalidTypeError(f"q and k must be uint8 symbols, got {q.dtype} and {k.dtype}")
        if q.device != self.keys.device or k.device != q.device:
            raise InvalidInputError(
                f"q and k must be on {self.keys.device}, got {q.device} and {k.device}"
            )
        if mask is not None and list(mask.shape) != [q.shape[0], q.shape[2]]:
            raise InvalidInputError(
                f"mask must have shape [B, n] = {[q.shape[0], q.shape[2]]}, got {list(mask.shape)}"
            )

    def index_select(self, rows: Tensor) -> StreamMemory:
        """A memory of these rows, in this order (beam search, batch selection)."""
        rows = rows.to(self.device)
        made = StreamMemory(
            max(1, len(rows)),
            self.routes,
            bits=self.bits,
            max_length=self.max_length,
            min_length=self.min_length,
            device=self.device,
        )
        for name in ("lengths", "queries", "keys", "runs"):
            setattr(made, name, getattr(self, name)[rows])
        made._most, made._ragged = self._most, self._ragged
        return made

    def fork(self) -> StreamMemory:
        """An independent copy."""
        return self.index_select(torch.arange(len(self.lengths)))

    def truncate(self, lengths: Tensor | int) -> None:
        """Forget what lies past the given length of each row."""
        if isinstance(lengths, int):
            self._most = min(self._most, lengths)
        elif lengths.device.type == "cpu":  # asking for the values is free there
            self._most = min(self._most, int(lengths.max()))
            self._ragged |= bool((lengths != lengths[0]).any())
        else:
            self._ragged = True
        kept = torch.as_tensor(lengths, device=self.device)
        self.lengths = torch.minimum(self.lengths, kept)
        self._rebuild()

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)
        self._ragged = False
