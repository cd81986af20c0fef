"""`counterfactual` over a match that was found ahead: only the read, and the same gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.ops.retrieve import read
from rosakit.types import Match


def read_given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    given: Match,
    credit: bool,
    options: tuple[Any, ...],
    sample: tuple[Tensor | None, int] = (None, 1),
) -> tuple[Tensor, Match]:
    """Read a match that was found ahead.

    Args:
        given: positions ``[B, R, T]``, with flipped ones for `credit`.
        options: bits, granularity, unmatched, key_credit, soft_values, temperature.
        sample: the credited positions ``[B, n]`` (None for all) and how often each counts.

    Raises:
        InvalidInputError: gradients are wanted and `given` has no flipped positions.
    """
    flipped = given.cf_position
    if credit and flipped is None:
        raise InvalidInputError(
            "the given match has no counterfactual positions, which the gradients of q and k need; "
            "begin it with credit=True"
        )
    if not credit or flipped is None:
        flipped = given.position.new_empty((*given.position.shape, 0))
    tensors = (q, k, v, e0, e1, e_null, segment_starts, given.position, flipped)
    y = torch.ops.rosakit.counterfactual_read(*tensors, *options, *sample)
    return y, given


@torch.library.custom_op("rosakit::counterfactual_read", mutates_args=())
def _read_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    position: Tensor,
    cf_position: Tensor,
    bits: int,
    granularity: str,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    return read(v, position, e0, e1, e_null, bits, unmatched)


@_read_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    position: Tensor,
    cf_position: Tensor,
    bits: int,
    granularity: str,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _setup_read(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, e0, e1, e_null, segment_starts, position, cf = inputs[:9]
    ctx.save_for_backward(q, k, v, e0, e1, position, cf, segment_starts, inputs[15])
    ctx.null_dtype = None if e_null is None else e_null.dtype
    ctx.options, ctx.stride = inputs[9:15], inputs[16]


def _backward_read(ctx, grad):  # type: ignore[no-untyped-def]
    *tensors, sampled = ctx.saved_tensors
    dq, dk, dv, de0, de1, de_null = torch.ops.rosakit.counterfactual_backward(
        grad, *tensors, *ctx.options, sampled, ctx.stride
    )
    de_null = None if ctx.null_dtype is None else de_null.to(ctx.null_dtype)
    return dq, dk, dv, de0, de1, de_null, *[None] * 11


_read_op.register_autograd(_backward_read, setup_context=_setup_read)
