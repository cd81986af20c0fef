"""Launcher of the fused pairwise forms, as a torch operator (docs/estimators/fused.md)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rosakit.ops.estimators.pairwise import Form, kept_at
from rosakit.ops.triton.engine import SEGMENT, Engine, description, engine_for, vector


def attend_fused(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    seed: Tensor | None = None,
) -> Tensor:
    """`pairwise.attend_naive` in O(T) memory, forward and backward, with float32 sums.

    With a window, `q` and `k` are signs: mismatches then are whole numbers, whose running sums are
    exact.
    """
    batch, routes, length, values = w.shape
    table = [_table(x) for x in (q, k, w)]
    if starts is not None:
        starts = torch.nn.functional.pad(starts, (0, -length % SEGMENT), value=-1).contiguous()
    y: Tensor
    y, _ = torch.ops.rosakit.attend(
        *table,
        table[2].new_empty(0) if null is None else _table(null),
        starts,
        seed,
        length,
        routes,
        form.gate,
        form.slope,
        form.bias,
        form.recurrence == "scan",
        form.score == "utility",
        form.sharpness,
        form.offset,
        form.cap,
        form.min_length,
        form.window,
        form.dropout if seed is not None else 0.0,
    )
    return y[:, :length, :values].reshape(batch, routes, length, values).to(w.dtype)


def _table(x: Tensor) -> Tensor:
    """``[B, R, T, M]`` to float32 ``[B * R, T, M]`` of whole segments and whole vectors."""
    width = x.shape[3]
    extra = (0, -width % vector(width), 0, -x.shape[2] % SEGMENT)
    return torch.nn.functional.pad(x.flatten(0, 1).float(), extra).contiguous()


def _null_logit(starts: Tensor | None, q: Tensor, options: tuple[Any, ...]) -> Tensor:
    """Base-2 logit of the null, ``[H, T]``."""
    utility, sharpness, min_length = options[6], options[7], options[10]
    own = torch.arange(q.shape[1], device=q.device)
    origin = own.new_zeros(1, q.shape[1]) if starts is None else starts.long()
    seen = (own - origin).float().repeat_interleave(q.shape[0] // origin.shape[0], dim=0)
    z = (
        torch.full_like(seen, sharpness / 2)
        if utility
        else sharpness * (min_length - 1 + seen / (seen + 1))
    )
    return z * math.log2(math.e)


def _padding(starts: Tensor | None, streams: int) -> Tensor | None:
    """1 at real positions, 0 at padding, ``[H, T, 1]``."""
    if starts is None:
        return None
    return (starts >= 0).float().repeat_interleave(streams // starts.shape[0], dim=0)[..., None]


def _dropped_null(q: Tensor, seed: Tensor, length: int, dropout: float) -> Tensor:
    """Dropout factors of the null's weight, ``[H, T]``."""
    streams, padded, _ = q.shape
    own = torch.arange(padded, device=q.device)
    stream = torch.arange(streams, device=q.device)[:, None]
    return kept_at(stream, own, own.new_tensor(length), dropout, seed)


def forward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    options: tuple[Any, ...],
    engine: Engine,
) -> tuple[Tensor, Tensor]:
    """``y [H, T, V]`` and the base-2 log of each row's softmax sum ``[H, T]``."""
    streams, length, values = w.shape
    offset, dropout = options[8], options[12]
    form = description(q, starts is not None, options)
    shape = (streams, engine.workers(q, w, form, backward=False), length)
    z_null = q.new_full((streams, length), -math.inf)
    top = torch.full(shape, -1.0e30, device=q.device)
    if offset:  # the null is a good first reference
        z_null = _null_logit(starts, q, options)
        top.copy_(z_null[:, None])
    total = torch.zeros(shape, device=q.device)
    out = torch.zeros((*shape, values), device=q.device)
    if options[0] > offset:
        engine.forward(q, k, w, starts, seed, top, total, out, form)
    best = top.amax(1)
    best = torch.maximum(best, z_null)
    shrink = (top - best[:, None]).exp2()
    p_null = (z_null - best).exp2()
    norm = ((total * shrink).sum(1) + p_null).clamp(min=1e-30)
    y = (out * shrink[..., None]).sum(1) / norm[..., None]
    if offset and null.numel():
        if seed is not None and dropout:
            p_null = p_null * _dropped_null(q, seed, options[0], dropout)
        y = y + (p_null / norm)[..., None] * null
    real = _padding(starts, streams)
    return y if real is None else y * real, best + norm.log2()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    y: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    options: tuple[Any, ...],
    engine: Engine,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k ``[H, T, M]``, w and null ``[H, T, V]``."""
    real = _padding(starts, q.shape[0])
    g = (grad if real is None else grad * real).contiguous()
    delta = (g * y).sum(2)
    offset, dropout = options[8], options[12]
    form = description(q, starts is not None, options)
    workers = engine.workers(q, w, form, backward=True)
    shares = tuple(
        torch.zeros((x.shape[0], workers, *x.shape[1:]), device=q.device) for x in (q, k, w)
    )
    dq, dk, dw = shares
    if options[0] > offset:
        engine.backward(g, q, k, w, lse, delta, starts, seed, (dq, dk, dw), form)
    dnull = torch.zeros_like(null)
    if offset and null.numel():
        p_null = (_null_logit(starts, q, options) - lse).exp2()
        if seed is not None and dropout:
            p_null = p_null * _dropped_null(q, seed, options[0], dropout)
        dnull = p_null[..., None] * g
    return dq.sum(1), dk.sum(1), dw.sum(1), dnull


# --- the operator ------------------------------------------------------------------------------


@torch.library.custom_op("rosakit::attend", mutates_args=())
def _attend_op(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    length: int,
    routes: int,
    gate: str,
    slope: float,
    bias: float,
    scan: bool,
    utility: bool,
    sharpness: float,
    offset: int,
    cap: int,
    min_length: int,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    options = (
        *(length, routes, gate, slope, bias, scan, utility),
        *(sharpness, offset, cap, min_length, window, dropout),
    )
    return forward(q, k, w, null, starts, seed, options, engine_for(q.device))


@_attend_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    length: int,
    routes: int,
    gate: str,
    slope: float,
    bias: float,
    scan: bool,
    utility: bool,
    sharpness: float,
    offset: int,
    cap: int,
    min_length: int,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), w.new_empty(w.shape[:2])


@torch.library.custom_op("rosakit::attend_backward", mutates_args=())
def _attend_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    y: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    length: int,
    routes: int,
    gate: str,
    slope: float,
    bias: float,
    scan: bool,
    utility: bool,
    sharpness: float,
    offset: int,
    cap: int,
    min_length: int,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (
        *(length, routes, gate, slope, bias, scan, utility),
        *(sharpness, offset, cap, min_length, window, dropout),
    )
    engine = engine_for(q.device)
    return backward(grad, q, k, w, null, y, lse, starts, seed, options, engine)


@_attend_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor,
    y: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    length: int,
    routes: int,
    gate: str,
    slope: float,
    bias: float,
    scan: bool,
    utility: bool,
    sharpness: float,
    offset: int,
    cap: int,
    min_length: int,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(w), torch.empty_like(null)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs[:4], y, lse, *inputs[4:6])
    ctx.options = inputs[6:]


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    gradients = torch.ops.rosakit.attend_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.options
    )
    return (*gradients, *[None] * 15)


_attend_op.register_autograd(_backward, setup_context=_setup_context)
