"""`bitflip`: what would the loss do if this one bit were flipped?

The exact single-bit finite difference of RWKV-8 and wind_rosa (semantics 3)::

    credit[u, m] = <g, y(bit m of symbol u flipped) - y>        for every bit of q and of k
    dx[u, m]     = -sign(x) credit[u, m] slope(x)

with ``slope(x) = 1 / (2 (1 + |x|)^2)`` or RWKV-8's ``1 / (2 max(|x|, floor))``. A flip of v only
changes what its readers read, so its credit is a scatter along the hard route.

How the credit is computed: `rosakit.ops.estimators.bitflip_credit`. ``stride > 1`` samples: the
flips of two random, mirrored combs of coordinates, weighted so that the expectation is the exact
credit.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.errors import InvalidInputError
from rosakit.ops import rows
from rosakit.ops.estimators.bitflip_credit import NONE, QUERY_KEY, STREAM, credit
from rosakit.ops.estimators.registry import MatchOptions, register
from rosakit.ops.retrieve import read_bits, retrieve_forward
from rosakit.types import Match, Unmatched

Slope = Literal["softsign", "inverse"]
Tied = Literal["none", "qk", "qkv"]


@register("bitflip")
def bitflip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: Unmatched = "zero",
    e_null: Tensor | None = None,
    slope: Slope = "softsign",
    floor: float = 1e-3,
    tied: bool | Tied = False,
    stride: int = 1,
) -> tuple[Tensor, Match]:
    """Hard retrieval forward, exact finite differences backward.

    Args:
        q, k, v: ``[B, T, C]``.
        e0, e1: ``[C]``.
        slope: "softsign": ``1 / (2 (1 + |x|)^2)``; "inverse": ``1 / (2 max(|x|, floor))``, the
            reference of RWKV-8.
        floor: of "inverse".
        tied: True or "qkv": q, k and v are one tensor, whose bit flips in all three at once
            (RWKV-8's 1-bit layer); "qk": q and k are. The joint gradient is returned as that of
            `q`, and zeros for the others of the one tensor.
        stride: 1: every flip. Larger: a random share ``2 / stride`` of the flips of q and k,
            unbiased. Saves time where it draws fewer than ``T / 32`` flips a route, or where no
            sweep takes the streams (run granularity, more than 65535 positions on a GPU).

    Returns:
        ``y [B, T, C]`` and the match that it read.

    Raises:
        InvalidInputError: an option out of range.
    """
    if slope not in ("softsign", "inverse"):
        raise InvalidInputError(f"slope must be 'softsign' or 'inverse', got {slope!r}")
    if not floor > 0:
        raise InvalidInputError(f"floor must be positive, got {floor}")
    joint = {False: NONE, True: STREAM}[tied] if isinstance(tied, bool) else tied
    if joint not in (NONE, QUERY_KEY, STREAM):
        raise InvalidInputError(f"tied must be a bool, 'qk' or 'qkv', got {tied!r}")
    if stride < 1:
        raise InvalidInputError(f"stride must be at least 1, got {stride}")
    phase = torch.randint(stride, (1,)) if stride > 1 else torch.zeros(1, dtype=torch.int64)
    y, position, length = torch.ops.rosakit.bitflip(
        q,
        k,
        v,
        e0,
        e1,
        e_null,
        match.segment_starts,
        phase,
        bits,
        match.granularity,
        match.successor,
        match.max_length or 0,
        match.min_length,
        match.backend,
        unmatched,
        slope,
        floor,
        joint,
        stride,
    )
    return y, Match(position, length)


def slope_of(x: Tensor, slope: str, floor: float) -> Tensor:
    """``sign(x) / (2 ...)``: what turns minus the credit into a gradient."""
    size = x.abs()
    scale = (1 + size).square() if slope == "softsign" else size.clamp(min=floor)
    return torch.where(x > 0, 0.5, -0.5).to(x.dtype) / scale


# --- the operator ------------------------------------------------------------------------------


@torch.library.custom_op("rosakit::bitflip", mutates_args=())
def _bitflip_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    phase: Tensor,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    slope: str,
    floor: float,
    tied: str,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    position, length, _ = torch.ops.rosakit.suffix_match(
        symbols.pack(q, bits),
        symbols.pack(k, bits),
        segment_starts,
        granularity,
        successor,
        max_length,
        min_length,
        0,
        backend,
    )
    return retrieve_forward(v, position, e0, e1, e_null, bits, unmatched), position, length


@_bitflip_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    phase: Tensor,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    slope: str,
    floor: float,
    tied: str,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = q.shape
    position = q.new_empty((batch, channels // bits, length), dtype=torch.int32)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, position, torch.empty_like(position)


@torch.library.custom_op("rosakit::bitflip_backward", mutates_args=())
def _bitflip_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    position: Tensor,
    phase: Tensor,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    slope: str,
    floor: float,
    tied: str,
    stride: int,
    addresses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(work)
    read = rows.effective_position(position, unmatched)
    matched = rows.channel_mask(read, bits)
    value = read_bits(v, read, bits)
    de1 = torch.where(value & matched, g, 0).sum((0, 1))
    de_matched = torch.where(matched, g, 0).sum((0, 1))
    de_null = g.sum((0, 1)) - de_matched
    theta = g * (e1.to(work) - e0.to(work))
    summed = rows.scatter_rows(rows.to_rows(theta, bits), rows.row_index(read))
    # The flip of a value bit changes it by +-(e1 - e0), so the sign of v cancels.
    dv = rows.from_rows(summed, *v.shape[:2]) * slope_of(v.to(work), slope, floor).abs()
    dq, dk = torch.zeros_like(q, dtype=work), torch.zeros_like(k, dtype=work)
    if addresses:
        options = MatchOptions(
            granularity,  # type: ignore[arg-type]
            successor,  # type: ignore[arg-type]
            max_length or None,
            min_length,
            segment_starts,
            backend,  # type: ignore[arg-type]
        )
        credit_q, credit_k = credit(
            g,
            q,
            k,
            v,
            e0.to(work),
            e1.to(work),
            None if e_null is None else e_null.to(work),
            bits=bits,
            match=options,
            unmatched=unmatched,
            tied=tied,
            phase=int(phase.item()),
            stride=stride,
        )
        dq = -credit_q * slope_of(q.to(work), slope, floor)
        dk = -credit_k * slope_of(k.to(work), slope, floor)
    if tied == STREAM:
        dv = torch.zeros_like(dv)
    dq, dk, dv = (d.to(x.dtype).contiguous() for d, x in ((dq, q), (dk, k), (dv, v)))
    return (
        dq,
        dk,
        dv,
        (de_matched - de1).to(e0.dtype),
        de1.to(e1.dtype),
        de_null,
    )


@_bitflip_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    position: Tensor,
    phase: Tensor,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    slope: str,
    floor: float,
    tied: str,
    stride: int,
    addresses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    work = torch.promote_types(grad.dtype, torch.float32)
    return like(q), like(k), like(v), like(e0), like(e1), e0.new_empty(e0.shape, dtype=work)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, position, length = output
    ctx.mark_non_differentiable(position, length)
    ctx.save_for_backward(*inputs[:8], position)
    ctx.options = inputs[8:]


def _backward(ctx, grad, *_: Any):  # type: ignore[no-untyped-def]
    q, k, v, e0, e1, e_null, starts, phase, position = ctx.saved_tensors
    dq, dk, dv, de0, de1, de_null = torch.ops.rosakit.bitflip_backward(
        grad,
        q,
        k,
        v,
        e0,
        e1,
        e_null,
        starts,
        position,
        phase,
        *ctx.options,
        any(ctx.needs_input_grad[:2]),
    )
    de_null = None if e_null is None else de_null.to(e_null.dtype)
    return dq, dk, dv, de0, de1, de_null, *[None] * 13


_bitflip_op.register_autograd(_backward, setup_context=_setup_context)
