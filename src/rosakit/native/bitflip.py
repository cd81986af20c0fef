"""Exact single-bit finite differences of whole streams, on numpy arrays."""

from __future__ import annotations

import numpy as np

from rosakit.errors import InvalidInputError
from rosakit.native import _checks
from rosakit.native._checks import Array
from rosakit.native._load import available, core


def built() -> bool:
    """Whether the compiled core is there and knows bit flips."""
    return available() and hasattr(core(), "bitflip_tied")


def bitflip_credit(
    q: Array,
    k: Array,
    v: Array,
    grad: Array,
    e0: Array,
    e1: Array,
    *,
    e_null: Array | None = None,
    unmatched_self: bool = False,
    segment_starts: Array | None = None,
    max_length: int | None = None,
    min_length: int = 1,
) -> tuple[Array, Array]:
    """``<grad, y(one bit flipped) - y>`` for every bit of q and of k, token granularity.

    Quadratic in the length of a stream for all its flips together.

    Args:
        q, k, v: symbols ``[B, R, T]``, uint8 or uint16.
        grad: float64 ``[B, R, T, M]``, the loss's slope in y.
        e0, e1: float64 ``[R, M]``.
        e_null: float64 ``[R, M]``: what a null reads; None for zeros.
        unmatched_self: a null reads its own position's value.
        segment_starts: int32 ``[B, T]``: where each position's segment starts, -1 at padding.

    Returns:
        float64 ``[B, R, T, M]`` arrays: credit of q and of k.

    Raises:
        InvalidInputError: shapes that do not fit.
        BackendError: the compiled core is missing.
    """
    native = core()
    _checks.same_symbols(q, k)
    _checks.same_symbols(q, v)
    _, _, longest, shortest = _checks.rule("token", "available", max_length, min_length)
    begin = _checks.starts(segment_starts, q.shape[0], q.shape[2])
    credit_q = np.empty(grad.shape, np.float64)
    credit_k = np.empty(grad.shape, np.float64)
    try:
        native.bitflip(
            *(np.ascontiguousarray(x) for x in (q, k, v)),
            begin,
            *(np.ascontiguousarray(x, np.float64) for x in (grad, e0, e1)),
            None if e_null is None else np.ascontiguousarray(e_null, np.float64),
            unmatched_self,
            credit_q,
            credit_k,
            longest,
            shortest,
        )
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    return credit_q, credit_k


def tied_bitflip_credit(
    x: Array,
    v: Array,
    grad: Array,
    e0: Array,
    e1: Array,
    *,
    flip_values: bool,
    e_null: Array | None = None,
    unmatched_self: bool = False,
    segment_starts: Array | None = None,
    max_length: int | None = None,
    min_length: int = 1,
) -> Array:
    """``<grad, y(one bit flipped) - y>`` for every bit of a stream that is query and key at once.

    Args:
        x: symbols ``[B, R, T]``, uint8 or uint16: query and key.
        v: symbols that are read.
        flip_values: v is x too, so that a flip changes what is read at its own place.
        grad, e0, e1, e_null, unmatched_self, segment_starts, max_length, min_length: as in
            `bitflip_credit`.

    Returns:
        float64 ``[B, R, T, M]``.

    Raises:
        InvalidInputError: shapes that do not fit.
        BackendError: the compiled core is missing.
    """
    native = core()
    _checks.same_symbols(x, v)
    _, _, longest, shortest = _checks.rule("token", "available", max_length, min_length)
    begin = _checks.starts(segment_starts, x.shape[0], x.shape[2])
    credit = np.empty(grad.shape, np.float64)
    try:
        native.bitflip_tied(
            *(np.ascontiguousarray(a) for a in (x, v)),
            flip_values,
            begin,
            *(np.ascontiguousarray(a, np.float64) for a in (grad, e0, e1)),
            None if e_null is None else np.ascontiguousarray(e_null, np.float64),
            unmatched_self,
            credit,
            longest,
            shortest,
        )
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    return credit
