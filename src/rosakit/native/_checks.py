"""Checks of arguments that the matcher and the memory share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rosakit.errors import InvalidInputError, InvalidTypeError

UNLIMITED = 2**31 - 1
SYMBOL_DTYPES = (np.uint8, np.uint16, np.int32)
Array = NDArray[Any]


def rule(
    granularity: str, successor: str, max_length: int | None, min_length: int
) -> tuple[bool, bool, int, int]:
    """The options as the core takes them: (run, strict, max_length, min_length)."""
    if granularity not in ("token", "run"):
        raise InvalidInputError(f"granularity must be 'token' or 'run', got {granularity!r}")
    if successor not in ("available", "strict"):
        raise InvalidInputError(f"successor must be 'available' or 'strict', got {successor!r}")
    longest = UNLIMITED if max_length is None else int(max_length)
    for name, value in (("max_length", longest), ("min_length", int(min_length))):
        if not 1 <= value <= UNLIMITED:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    return granularity == "run", successor == "strict", longest, int(min_length)


def same_symbols(q: Array, k: Array) -> None:
    """Raise unless `q` and `k` are symbol arrays ``[B, R, T]`` of one shape and dtype."""
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in SYMBOL_DTYPES:
            raise InvalidTypeError(
                f"{name} has dtype {x.dtype}; symbols are uint8, uint16 or int32 (token ids)"
            )
        if x.ndim != 3:
            raise InvalidInputError(f"{name} has shape {x.shape}; expected [B, R, T]")
    if q.dtype != k.dtype:
        raise InvalidTypeError(f"q is {q.dtype} but k is {k.dtype}; use one dtype for both")
    if q.shape != k.shape:
        raise InvalidInputError(f"q has shape {q.shape} but k has {k.shape}; they must agree")
    stream_length(q.shape[2])


def stream_length(n: int) -> None:
    """Raise unless positions of a stream of `n` symbols fit int32."""
    if n >= UNLIMITED:
        raise InvalidInputError(
            f"a stream of {n} symbols is too long: positions are int32, fewer than 2^31 - 1 fit"
        )


def starts(segment_starts: Array | None, batch: int, time: int) -> Array | None:
    """`segment_starts` as C-contiguous int32 ``[B, T]``."""
    if segment_starts is None:
        return None
    if segment_starts.shape != (batch, time):
        raise InvalidInputError(
            f"segment_starts has shape {segment_starts.shape}; expected [B, T] = [{batch}, {time}]"
        )
    return np.ascontiguousarray(segment_starts, dtype=np.int32)
