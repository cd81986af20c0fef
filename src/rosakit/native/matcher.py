"""Whole-sequence calls of the core on numpy arrays."""

from __future__ import annotations

import numpy as np

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.native import _checks
from rosakit.native._checks import Array
from rosakit.native._load import core


def match(
    q: Array,
    k: Array,
    *,
    granularity: str = "token",
    successor: str = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Array | None = None,
    counterfactual_bits: int = 0,
    flip_at: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """The exact suffix match of every stream, in near-linear time for any input.

    Args:
        q: query symbols ``[B, R, T]``, uint8, uint16 or int32 (nonnegative).
        k: key symbols, the same shape and type.
        granularity: "token" or "run"; see `rosakit.ops.suffix_match`.
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long; None for no limit.
        min_length: a shorter best match is no match.
        segment_starts: int32 ``[B, T]``: where each position's segment starts, -1 at padding.
        counterfactual_bits: M > 0 also flips each of the low M bits of the query's last symbol.
        flip_at: uint8 ``[B, T]``, nonzero where that is done; elsewhere a flip is given the
            position of the match itself. None for everywhere.

    Returns:
        int32 arrays: position ``[B, R, T]`` (-1: no match), length ``[B, R, T]``, and the flipped
        queries' positions ``[B, R, T, M]`` or None.

    Raises:
        InvalidTypeError: a dtype that is no symbol dtype.
        InvalidInputError: shapes or options that do not fit, negative symbols.
        BackendError: the compiled core is missing.
    """
    if not 0 <= counterfactual_bits <= 16:
        raise InvalidInputError(f"counterfactual_bits={counterfactual_bits} is outside 0..16")
    flips = (*q.shape, counterfactual_bits)
    position = np.empty(q.shape, np.int32)
    length = np.empty(q.shape, np.int32)
    flipped = np.empty(flips, np.int32) if counterfactual_bits else None
    match_into(
        q,
        k,
        position,
        length,
        flipped,
        granularity=granularity,
        successor=successor,
        max_length=max_length,
        min_length=min_length,
        segment_starts=segment_starts,
        flip_at=flip_at,
    )
    return position, length, flipped


def match_into(
    q: Array,
    k: Array,
    position: Array,
    length: Array,
    flipped: Array | None,
    *,
    granularity: str = "token",
    successor: str = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Array | None = None,
    flip_at: Array | None = None,
) -> None:
    """`match` into the caller's arrays, for example in pinned memory.

    Args:
        q, k: symbols ``[B, R, T]`` as in `match`.
        position, length: int32 ``[B, R, T]``, C-contiguous; every element is written.
        flipped: int32 ``[B, R, T, M]``, C-contiguous, or None for no flipped queries.
        flip_at: as in `match`.

    Raises:
        InvalidTypeError, InvalidInputError, BackendError: as `match`.
    """
    native = core()
    _checks.same_symbols(q, k)
    run, strict, longest, shortest = _checks.rule(granularity, successor, max_length, min_length)
    bits = 0 if flipped is None else flipped.shape[-1]
    width = 8 * q.dtype.itemsize if q.dtype != np.int32 else 16
    if not 0 <= bits <= min(width, 16):
        raise InvalidInputError(
            f"counterfactual_bits={bits} is outside 0..{min(width, 16)} for {q.dtype} symbols"
        )
    begin = _checks.starts(segment_starts, q.shape[0], q.shape[2])
    try:
        native.match(
            np.ascontiguousarray(q),
            np.ascontiguousarray(k),
            begin,
            position,
            length,
            flipped,
            run,
            strict,
            longest,
            shortest,
            None if flip_at is None else np.ascontiguousarray(flip_at, np.uint8),
        )
    except ValueError as error:
        raise InvalidInputError(str(error)) from None


def best_successors(
    tokens: Array,
    candidates: int,
    *,
    segment_starts: Array | None = None,
    min_length: int = 1,
    max_length: int | None = None,
) -> tuple[Array, Array]:
    """The K best distinct successors of every position of a token stream (semantics 5).

    Args:
        tokens: int32 ``[B, T]``, nonnegative.
        candidates: K.
        segment_starts: int32 ``[B, T]``: where each position's segment starts, -1 at padding.

    Returns:
        int32 ``[B, T, K]`` arrays (position, length): the successor's index, ``<= i``, and how
        long the context before it agrees, ordered by (length, position) downwards and distinct by
        successor token; -1 and 0 where there are fewer than K.
    """
    native = core()
    if tokens.dtype != np.int32:
        raise InvalidTypeError(f"tokens has dtype {tokens.dtype}; expected int32")
    if tokens.ndim != 2:
        raise InvalidInputError(f"tokens has shape {tokens.shape}; expected [B, T]")
    if not 1 <= candidates <= 1024:
        raise InvalidInputError(f"candidates must be between 1 and 1024, got {candidates}")
    batch, time = tokens.shape
    _checks.stream_length(time)
    _, _, longest, shortest = _checks.rule("token", "available", max_length, min_length)
    begin = _checks.starts(segment_starts, batch, time)
    position = np.empty((batch, time, candidates), np.int32)
    length = np.empty_like(position)
    try:
        native.best_successors(
            np.ascontiguousarray(tokens), begin, position, length, longest, shortest
        )
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    return position, length
