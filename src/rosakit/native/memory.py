"""`SuffixMemory`: the streaming state of B x R streams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rosakit.errors import CheckpointError, InvalidInputError, InvalidTypeError
from rosakit.files import atomic_write
from rosakit.native import _checks
from rosakit.native._checks import Array
from rosakit.native._load import core
from rosakit.types import Match

Rows = Sequence[int] | Array | Tensor


class SuffixMemory:
    """Streaming suffix match: any chunking gives the numbers of one whole-sequence call.

    Rows have their own lengths: positions count a row's unmasked symbols, and a masked (padded)
    position neither extends the memory nor matches.

    Args:
        batch: rows B.
        routes: streams R of a row.
        bits: bits a symbol, 1 to 16; None for token ids (int32, nonnegative).
        symbols: "int32" says token ids explicitly; only with ``bits=None``.
        granularity: "token" or "run"; see `rosakit.ops.suffix_match`.
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long; None for no limit.
        min_length: a shorter best match is no match.
        max_bytes: bound on the bytes reserved. Before it would be passed, the row that remembers
            most forgets the older half of it (`starts`); matches stay exact among the positions
            still remembered.

    Example:
        >>> memory = SuffixMemory(batch=1, routes=512, bits=4)
        >>> match = memory.extend(q, k)        # [1, 512, n], any n
        >>> beams = memory.index_select([0, 0, 0])
        >>> beams.truncate(100)

    Raises:
        InvalidInputError: an option is out of range.
        BackendError: the compiled core is missing.
    """

    def __init__(
        self,
        batch: int = 1,
        routes: int = 1,
        *,
        bits: int | None = None,
        symbols: str | None = None,
        granularity: str = "token",
        successor: str = "available",
        max_length: int | None = None,
        min_length: int = 1,
        max_bytes: int | None = None,
    ) -> None:
        native = core()
        if batch < 0 or routes < 1:
            raise InvalidInputError(
                f"batch={batch}, routes={routes}: expected batch >= 0, routes >= 1"
            )
        if symbols not in (None, "int32"):
            raise InvalidInputError(f"symbols must be 'int32' (token ids) or None, got {symbols!r}")
        if bits is not None and (symbols is not None or not 1 <= bits <= 16):
            raise InvalidInputError(
                f"bits={bits}, symbols={symbols!r}: give bits from 1 to 16, or symbols='int32'"
            )
        rule = _checks.rule(granularity, successor, max_length, min_length)
        try:
            self._state = native.SuffixMemory(batch, routes, bits or 0, *rule, max_bytes or 0)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    @classmethod
    def _wrap(cls, state: Any) -> SuffixMemory:
        self = cls.__new__(cls)
        self._state = state
        return self

    # --- what it is ---------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return int(self._state.options()[0])

    @property
    def routes(self) -> int:
        return int(self._state.options()[1])

    @property
    def bits(self) -> int | None:
        """Bits a symbol; None for token ids."""
        return int(self._state.options()[2]) or None

    @property
    def lengths(self) -> Array:
        """int64 ``[B]``: symbols that each row remembers."""
        return np.asarray(self._state.lengths(), np.int64)

    @property
    def starts(self) -> Array:
        """int64 ``[B]``: each row's first position still remembered; 0 without `max_bytes`."""
        return np.asarray(self._state.starts(), np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes in use by the state."""
        return int(self._state.live_bytes())

    @property
    def reserved_nbytes(self) -> int:
        """Bytes allocated for the state, room to grow included."""
        return int(self._state.reserved_bytes())

    def symbol(self, row: int, position: int, route: int = 0) -> int:
        """The key symbol at a position of a row's stream."""
        try:
            return int(self._state.symbol(row, route, position))
        except (IndexError, TypeError) as error:
            raise InvalidInputError(str(error)) from None

    def __repr__(self) -> str:
        kind = f"bits={self.bits}" if self.bits else "symbols='int32'"
        return (
            f"SuffixMemory(batch={self.batch}, routes={self.routes}, {kind}, "
            f"lengths={self.lengths.tolist()})"
        )

    # --- feeding ------------------------------------------------------------------------------

    def extend(
        self,
        q: Array | Tensor,
        k: Array | Tensor,
        *,
        mask: Array | Tensor | None = None,
        candidates: int | None = None,
    ) -> Match:
        """Match a chunk of queries and remember its keys.

        Args:
            q: query symbols ``[B, R, n]``, numpy array or CPU tensor; uint8, uint16 or int32.
            k: key symbols, the same shape, type and kind.
            mask: bool ``[B, n]``, False at padding.
            candidates: K: return the K best distinct successors instead of the match (semantics
                5); needs ``routes=1``, token granularity and ``q`` equal to ``k``.

        Returns:
            `Match` of int32 position and length, ``[B, R, n]``, or ``[B, 1, n, K]`` with
            `candidates`; numpy arrays for numpy input, tensors for tensors. Positions count the
            row's unmasked symbols.

        Raises:
            InvalidTypeError: wrong dtype or kind of input.
            InvalidInputError: wrong shape, symbols out of range; the memory is unchanged.
        """
        as_tensor = isinstance(q, Tensor)
        qa = _as_array(q, "q")
        ka = qa if k is q else _as_array(k, "k")
        _checks.same_symbols(qa, ka)
        batch, routes, n = qa.shape
        if (batch, routes) != (self.batch, self.routes):
            raise InvalidInputError(
                f"q has shape {qa.shape}; this memory takes [{self.batch}, {self.routes}, n]"
            )
        if candidates is not None:
            self._check_candidates(candidates, qa, ka)
        kept = None
        if mask is not None:
            kept = np.ascontiguousarray(_as_array(mask, "mask"), dtype=np.uint8)
            if kept.shape != (batch, n):
                raise InvalidInputError(f"mask has shape {kept.shape}; expected [{batch}, {n}]")
        if self.batch and n:
            _checks.stream_length(int(self.lengths.max()) + n)
        position = np.empty((batch, routes, n, candidates or 1), np.int32)
        length = np.empty_like(position)
        try:
            self._state.extend(qa, ka, kept, position, length, candidates is not None)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None
        if candidates is None:
            position, length = position[..., 0], length[..., 0]
        if as_tensor:
            return Match(torch.from_numpy(position), torch.from_numpy(length))
        arrays: Any = position, length  # of the caller's own kind; Match is typed for tensors
        return Match(*arrays)

    def step(
        self,
        q: Array | Tensor,
        k: Array | Tensor,
        *,
        mask: Array | Tensor | None = None,
        out: Match | tuple[Any, Any] | None = None,
    ) -> Match:
        """`extend` by one position of every stream: decoding, without an allocation.

        Args:
            q: query symbols ``[B, R]``, C-contiguous numpy array or CPU tensor; uint8, uint16 or
                int32.
            k: key symbols, the same shape, type and kind.
            mask: ``[B]``, False where a row takes no step.
            out: (position, length) to write to, int32 ``[B, R]``, C-contiguous, of the same kind;
                returned as it is. None makes new ones.

        Returns:
            `Match` of position and length, ``[B, R]``.

        Raises:
            InvalidTypeError: wrong dtype, kind or memory layout.
            InvalidInputError: wrong shape, symbols out of range; the memory is unchanged.

        Example:
            >>> out = Match(*np.empty((2, 1, 512), np.int32))
            >>> for q, k in symbols:
            ...     memory.step(q, k, out=out)
        """
        if out is None:
            shape = tuple(q.shape)
            made: Any = (
                (torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.int32))
                if isinstance(q, Tensor)
                else (np.empty(shape, np.int32), np.empty(shape, np.int32))
            )
            out = Match(*made)
        elif not isinstance(out, Match):
            out = Match(*out)
        if mask is not None:
            mask = np.ascontiguousarray(_as_array(mask, "mask"), dtype=np.uint8)
        try:
            self._state.step(q, k, mask, out.position, out.length)
        except TypeError:
            raise InvalidTypeError(_step_fault(q, k, out)) from None
        except ValueError as error:
            raise InvalidInputError(str(error)) from None
        return out

    def _check_candidates(self, candidates: int, q: Array, k: Array) -> None:
        if not 1 <= candidates <= 1024:
            raise InvalidInputError(f"candidates must be between 1 and 1024, got {candidates}")
        if self.routes != 1 or self._state.options()[3]:
            raise InvalidInputError("candidates needs routes=1 and granularity='token'")
        if k is not q and not np.array_equal(q, k):
            raise InvalidInputError("candidates are those of a self-matching stream: pass q as k")

    # --- copying, reordering, shortening ------------------------------------------------------

    def fork(self) -> SuffixMemory:
        """An independent copy; what both have in common is shared until one changes it."""
        return self.index_select(range(self.batch))

    def index_select(self, rows: Rows | range) -> SuffixMemory:
        """A memory whose row ``i`` is a copy of row ``rows[i]`` (beam search, batch selection)."""
        order = _as_list(rows)
        try:
            return self._wrap(self._state.index_select(order))
        except (IndexError, TypeError) as error:
            raise InvalidInputError(str(error)) from None

    def truncate(self, length: int | Rows) -> None:
        """Forget what lies past a length, or past one length for each row ``[B]``."""
        lengths = [length] * self.batch if isinstance(length, int) else _as_list(length)
        if len(lengths) != self.batch:
            raise InvalidInputError(f"got {len(lengths)} lengths for {self.batch} rows")
        if any(n < 0 for n in lengths):
            raise InvalidInputError(f"lengths must be >= 0, got {lengths}")
        for row, n in enumerate(lengths):
            self._state.truncate(row, n)

    def rollback(self, n: int | Rows) -> None:
        """Forget the last ``n`` symbols of every row, or ``n[b]`` of row b."""
        counts = [n] * self.batch if isinstance(n, int) else _as_list(n)
        if len(counts) != self.batch or any(c < 0 for c in counts):
            raise InvalidInputError(f"expected {self.batch} counts >= 0, got {counts}")
        now = self.lengths
        if any(c > have for c, have in zip(counts, now, strict=True)):
            raise InvalidInputError(f"cannot roll back {counts} symbols of rows of {now.tolist()}")
        self.truncate([int(have) - c for c, have in zip(counts, now, strict=True)])

    def reset(self, rows: Rows | None = None) -> None:
        """Forget everything, or everything of some rows."""
        for row in range(self.batch) if rows is None else _as_list(rows):
            if not 0 <= row < self.batch:
                raise InvalidInputError(f"row {row} of a memory of {self.batch} rows")
            self._state.truncate(row, 0)

    # --- saving -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a file, atomically (format: docs/memory-format.md).

        Raises:
            CheckpointError: it cannot be written; what the file held before is unchanged.
        """
        try:
            atomic_write(path, self.to_bytes())
        except OSError as error:
            raise CheckpointError(
                f"cannot save the memory to {path}: {error.strerror or error}; free some space or "
                "name another folder"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SuffixMemory:
        """Read a memory that `save` wrote.

        Raises:
            CheckpointError: the file is missing, truncated, damaged, foreign or too new.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read a memory from {path}: {error}") from error
        return cls.from_bytes(data, str(path))

    def to_bytes(self) -> bytes:
        """What `save` writes, for files that hold more than a memory."""
        return bytes(self._state.serialize())

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, source: str = "saved memory") -> SuffixMemory:
        """A memory from what `to_bytes` gave.

        Args:
            data: the bytes.
            source: what messages call them.

        Raises:
            CheckpointError: truncated, damaged, foreign or too new.
        """
        try:
            return cls._wrap(core().SuffixMemory.deserialize(bytes(data)))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return SuffixMemory.from_bytes, (self.to_bytes(), "pickled memory")

    def __deepcopy__(self, memo: dict[int, Any]) -> SuffixMemory:
        return self.fork()

    def __enter__(self) -> SuffixMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.reset()


def _step_fault(q: Any, k: Any, out: Match) -> str:
    """Why the core did not take a step's arrays."""
    for name, x in (("q", q), ("k", k), ("out.position", out.position), ("out.length", out.length)):
        if not isinstance(x, Tensor | np.ndarray):
            return f"{name} is a {type(x).__name__}; expected a numpy array or a CPU tensor"
        contiguous = x.is_contiguous() if isinstance(x, Tensor) else x.flags.c_contiguous
        if x.ndim != 2 or not contiguous:
            return f"{name} has shape {tuple(x.shape)}; a step takes C-contiguous [B, R] arrays"
    dtypes = ", ".join(str(x.dtype) for x in (q, k, out.position, out.length))
    return (
        f"q, k, out.position, out.length are {dtypes}; symbols are uint8, uint16 or int32, of one "
        "dtype, and results int32, all on the CPU"
    )


def _as_array(x: Any, name: str) -> Array:
    if isinstance(x, Tensor):
        if x.device.type != "cpu":
            raise InvalidTypeError(f"{name} is on {x.device}; the memory takes CPU tensors")
        return np.ascontiguousarray(x.detach().numpy())
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x)
    raise InvalidTypeError(f"{name} is a {type(x).__name__}; expected a numpy array or a tensor")


def _as_list(x: Rows | range) -> list[int]:
    if isinstance(x, Tensor | np.ndarray):
        return [int(v) for v in x.reshape(-1).tolist()]
    return [int(v) for v in x]
