"""`StreamMemory`: the streaming state of suffix matching in GPU memory (semantics 2.3).

Where the CPU's memory keeps an index, this one keeps for every lag the length of the current run
and passes over all of them at every step: more work, but memory bandwidth is what a GPU has, and a
step needs no transfer and no synchronisation. `docs/guides/backends.md` says which is faster when.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rosakit.cuda import compile, matcher
from rosakit.cuda.project import FORMATS as _FORMATS
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.types import NO_MATCH, Match

_KERNELS = ("extend_streams", "step_streams", "rebuild_runs")
_THREADS = 512
_SOURCES = ("format.cuh", "stream.cu")
_UNLIMITED = 0xFFFFFFFF
_MASK, _LENGTHS, _START = 6, 11, 15  # arguments of step_streams that change from step to step
STEPS = 8
"""Chunks up to this length go symbol by symbol; longer ones through the whole-sequence matcher."""


def bytes_a_symbol(bits: int) -> float:
    """State of one symbol of one stream: query, key and value, and the run at its lag."""
    return 3 * symbol_bytes(bits) + 2


def symbol_bytes(bits: int) -> float:
    """Bytes of a stored symbol: two of up to four bits lie in one."""
    return 0.5 if bits <= 4 else 1.0


def folded(symbols: Tensor, bits: int) -> Tensor:
    """uint8 symbols ``[..., n]`` as they are stored; n is even."""
    if bits > 4:
        return symbols.contiguous()
    return symbols[..., ::2] | symbols[..., 1::2] << 4


def unfolded(stored: Tensor, bits: int) -> Tensor:
    """What `folded` was made of."""
    if bits > 4:
        return stored
    return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)


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
        self.batch = batch
        self.queries, self.keys, self.values = (
            torch.empty((batch, routes, 0), dtype=torch.uint8, device=device) for _ in range(3)
        )
        self.runs = torch.empty((batch, routes, 0), dtype=torch.int16, device=device)
        self.device = self.runs.device  # with its number
        self._most = 0  # a bound of the lengths that the host knows
        self._ragged: Tensor | None = None  # int64 [B] once rows may differ in length

    @property
    def lengths(self) -> Tensor:
        """Symbols of each row, int64 ``[B]`` on the device."""
        if self._ragged is not None:
            return self._ragged
        return torch.full((self.batch,), self._most, dtype=torch.int64, device=self.device)

    @property
    def capacity(self) -> int:
        """Symbols of a stream that there is room for."""
        return int(self.runs.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory held."""
        tables = (self.queries, self.keys, self.values, self.runs)
        return sum(x.numel() * x.element_size() for x in tables)

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
        mask = self._unequal(mask)
        small = n <= STEPS or self._most + n > matcher.MAX_POSITIONS
        return self._extend(q, k, mask) if small else self._whole(q, k, mask)

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
        *,
        mask: Tensor | None = None,
        own: bool = False,
        match: bool = True,
    ) -> tuple[Tensor, Match | None]:
        """`extend` from channels to the values read, in one kernel: short chunks only.

        Args:
            q, k, v: ``[B, n, C]`` with ``C = R * bits``, of one dtype, tokens equally far apart.
            e0, e1, e_null: levels ``[C]``, as `rosakit.ops.retrieve`.
            mask: as `extend`.
            own: a null reads the position's own value.
            match: whether the match is wanted, too.

        Returns:
            ``y [B, n, C]`` and the match ``[B, R, n]``, or None.
        """
        batch, n, channels = v.shape
        self._reserve(self._most + n)
        kept = self._unequal(mask)
        y = torch.empty((batch, n, channels), dtype=v.dtype, device=v.device)
        found = None
        if match:
            position = torch.empty((batch, self.routes, n), dtype=torch.int32, device=v.device)
            found = Match(position, torch.empty_like(position))
        self._launch(
            "step_streams",
            [
                *(q, k, v, e0, e1, e_null),
                None if kept is None else kept.to(torch.uint8).contiguous(),
                *(self.queries, self.keys, self.values, self.runs, self._ragged, y),
                *((None, None) if found is None else found[:2]),
            ],
            [self._most, self.routes, n],
            [self.max_length or _UNLIMITED, self.min_length, v.stride(1), int(own)],
            (_FORMATS[v.dtype], _FORMATS[e0.dtype]),
        )
        self._grow(n, kept)
        return y, found

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a prepared step writes to: once one is another tensor, prepare anew."""
        return self.queries, self.keys, self.values, self.runs

    def prepare(
        self,
        channels: tuple[int, int, int],
        levels: tuple[int, int, int],
        y: int,
        n: int,
        *,
        stride: int,
        own: bool,
        formats: tuple[int, int],
    ) -> compile.Prepared:
        """`read` by addresses, of which nothing is checked, for `take` to launch.

        Args:
            channels: of q, k and v, tokens `stride` numbers apart.
            levels: of e0, e1 and e_null (0 for none).
            y: ``[B, n, C]`` to write to.
            n: tokens of a row.
            own: as `read`.
            formats: numbers of the dtypes of channels and levels, see `rosakit.cuda.project`.
        """
        numbers = [*channels, *levels, 0, *(x.data_ptr() for x in self.tables()), 0, y, 0, 0]
        numbers += [0, self.routes, n, self.capacity, self.max_length or _UNLIMITED]
        numbers += [self.min_length, stride, int(own)]
        return self._prepared("step_streams", numbers, formats)

    def reserve(self, n: int) -> None:
        """Room for n more symbols, so that what is prepared now can take them."""
        self._reserve(self._most + n)

    def take(self, prepared: compile.Prepared, n: int, mask: Tensor | None, stream: int) -> None:
        """Launch what `prepare` made for n symbols of each row, which room is reserved for."""
        kept = self._unequal(mask)
        given = None if kept is None else kept.to(torch.uint8).contiguous()
        slots = prepared.slots
        slots[_MASK] = 0 if given is None else given.data_ptr()
        slots[_LENGTHS] = 0 if self._ragged is None else self._ragged.data_ptr()
        slots[_START] = self._most
        prepared.queue(stream)
        self._grow(n, kept)

    def fits(self, channels: list[Tensor], e0: Tensor) -> bool:
        """Whether `read` takes these q, k and v."""
        batch, n, width = channels[-1].shape
        stride = channels[-1].stride(1)
        return (
            n <= STEPS
            and n * batch > 0
            and channels[-1].dtype in _FORMATS
            and e0.dtype in _FORMATS
            and all(
                x.stride(2) == 1
                and x.stride(1) == stride
                and (batch == 1 or x.stride(0) == n * stride)
                and x.dtype == channels[-1].dtype
                and x.shape[2] == width
                for x in channels
            )
        )

    def read_whole(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, own: bool = False
    ) -> tuple[Tensor, Match]:
        """`read` of a chunk of any length, from symbols to symbols.

        Args:
            q, k, v: uint8 ``[B, R, n]``.
            own: a null reads the position's own value.

        Returns:
            The value symbols read ``[B, R, n]``, anything where nothing was found, and the match.
        """
        before, most = self.lengths, self._most
        found = self.extend(q, k, mask=mask)
        place, column = self.places(before, most, q.shape[2], mask)
        table = self._room(unfolded(self.values, self.bits))
        table.scatter_(2, column[:, None].expand_as(v), v)
        self.values = folded(table[..., : self.capacity], self.bits)
        position = found.position
        if own:
            position = torch.where(position >= 0, position, place[:, None].to(torch.int32))
        return table.gather(2, position.clamp(min=0).to(torch.int64)), found

    def _unequal(self, mask: Tensor | None) -> Tensor | None:
        """The mask on the device; from the first on, rows count for themselves."""
        if mask is None:
            return None
        self._ragged = self.lengths
        return mask.to(self.device, torch.bool)

    def _extend(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Match:
        position = torch.empty(q.shape, dtype=torch.int32, device=self.device)
        length = torch.empty_like(position)
        _, routes, n = q.shape
        if q.numel():
            kept = None if mask is None else mask.to(torch.uint8).contiguous()
            self._launch(
                "extend_streams",
                [
                    *(q.contiguous(), k.contiguous(), kept),
                    *(self.queries, self.keys, self.runs, self._ragged),
                    *(position, length),
                ],
                [self._most, routes, n],
                [self.max_length or _UNLIMITED, self.min_length],
            )
        self._grow(n, mask)
        return Match(position, length)

    def _room(self, table: Tensor) -> Tensor:
        """The table and a column for what is masked."""
        return torch.nn.functional.pad(table, (0, 1))

    def _whole(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Match:
        """The whole history once more, by the matcher; then the runs of the newest position."""
        batch, routes, n = q.shape
        own, place = self.places(self.lengths, self._most, n, mask)
        index = place[:, None].expand(batch, routes, n)
        history = []
        for name, chunk in (("queries", q), ("keys", k)):
            table = self._room(unfolded(getattr(self, name), self.bits))
            table.scatter_(2, index, chunk)
            setattr(self, name, folded(table[..., : self.capacity], self.bits))
            history.append(table)
        self._grow(n, mask)
        starts = None
        if self._ragged is not None:
            column = torch.arange(self._most, device=self.device)
            starts = torch.where(column < self.lengths[:, None], 0, -1).to(torch.int32)
        position, length, _ = matcher.match(
            *(x[..., : self._most].contiguous() for x in history),
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
        if self._ragged is not None:
            self._ragged = self._ragged + (n if mask is None else mask.sum(1))
        self._most += n

    def _rebuild(self) -> None:
        if self.keys.numel():
            self._launch(
                "rebuild_runs",
                [self.queries, self.keys, self.runs, self._ragged],
                [self._most, self.routes],
                [],
            )

    def _launch(
        self,
        name: str,
        tensors: list[Tensor | None],
        before: list[int],
        after: list[int],
        formats: tuple[int, int] = (0, 0),
    ) -> None:
        kernel = _kernels(self.bits, *formats, self.device.index)[name]
        numbers = [0 if x is None else x.data_ptr() for x in tensors]
        numbers += [*before, self.capacity, *after]
        kernel.launch_words((self.batch * self.routes, 1, 1), _THREADS, numbers)

    def _prepared(
        self, name: str, numbers: list[int], formats: tuple[int, int]
    ) -> compile.Prepared:
        kernel = _kernels(self.bits, *formats, self.device.index)[name]
        return kernel.prepare((self.batch * self.routes, 1, 1), _THREADS, numbers)

    def _reserve(self, length: int) -> None:
        """Room for `length` symbols and a spare column; an eighth more when it grows."""
        capacity = self.capacity
        if length < capacity:
            return
        grown = max(length + 1, capacity + capacity // 8, 256)
        grown = -(-grown // 32) * 32
        for name in ("queries", "keys", "values", "runs"):
            held = getattr(self, name)
            wanted = grown if name == "runs" else int(grown * symbol_bytes(self.bits))
            setattr(self, name, torch.nn.functional.pad(held, (0, wanted - held.shape[2])))

    def _check(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        expected = [self.batch, self.routes]
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
        for name in ("queries", "keys", "values", "runs"):
            setattr(made, name, getattr(self, name)[rows])
        made._most = self._most
        made._ragged = None if self._ragged is None else self._ragged[rows]
        return made

    def fork(self) -> StreamMemory:
        """An independent copy."""
        return self.index_select(torch.arange(self.batch))

    def truncate(self, lengths: Tensor | int) -> None:
        """Forget what lies past the given length of each row."""
        before = self.lengths
        if isinstance(lengths, int):
            self._most = min(self._most, lengths)
        elif lengths.device.type == "cpu":  # asking for the values is free there
            self._most = min(self._most, int(lengths.max()))
            if self._ragged is None and bool((lengths != lengths[0]).any()):
                self._ragged = before
        elif self._ragged is None:
            self._ragged = before
        if self._ragged is not None:
            self._ragged = torch.minimum(before, torch.as_tensor(lengths, device=self.device))
        self._rebuild()

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)
        self._ragged = None

    def history(self) -> list[Tensor]:
        """Queries, keys and values, uint8 ``[B, R, capacity]``; rows fill their first places."""
        return [unfolded(x, self.bits) for x in (self.queries, self.keys, self.values)]


@functools.cache
def _kernels(bits: int, scalar: int, level: int, index: int) -> dict[str, compile.Kernel]:
    macros = {"NIBBLES": int(bits <= 4), "M": bits, "SCALAR": scalar, "E_SCALAR": level}
    with torch.cuda.device(index):
        return compile.load(_SOURCES, _KERNELS, macros, torch.device("cuda", index))
