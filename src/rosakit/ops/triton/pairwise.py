"""Launcher of the fused pairwise forms, as a torch operator (docs/estimators/fused.md)."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosakit.ops.estimators.pairwise import UTILITY, Form, threshold

MAX_WIDTH = 16
SEGMENT = 16  # rows a segment
_PROGRAMS = 2112  # 16 warps on each of 132 multiprocessors
_DENSE_BYTES = 5 << 29  # 2.5 GiB: what the backward may spend on marks to save a march


class Plan(NamedTuple):
    """Launch sizes: diagonals a strip (a multiple of 32), workers a stream, registers a thread.

    `dense` keeps four times the marks on the way down, and saves one of three marches.
    """

    strip: int
    workers: int
    registers: int | None = None
    dense: bool = False


def _interpreted() -> bool:
    """Whether Triton interprets its kernels (TRITON_INTERPRET=1), as tests on a CPU do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def unavailable_reason(device: torch.device, form: Form, width: int, values: int) -> str | None:
    """Why the kernels cannot run on these tensors, or None where they can."""
    if form.window:
        return "the fused kernels take whole suffixes, not a window"
    if width > MAX_WIDTH or values > MAX_WIDTH:
        return f"the fused kernels take at most {MAX_WIDTH} channels a route"
    if device.type != "cuda" and not _interpreted():
        return f"the fused kernels run on CUDA devices, not on {device.type}"
    return _missing()


def attend_fused(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    seed: Tensor | None = None,
) -> Tensor:
    """`pairwise.attend_naive` in O(T) memory, forward and backward, with float32 sums."""
    batch, routes, length, values = w.shape
    table = [_table(x) for x in (q, k, w)]
    if starts is not None:
        starts = torch.nn.functional.pad(starts, (0, -length % SEGMENT), value=-1)
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
        form.dropout if seed is not None else 0.0,
    )
    return y[:, :length, :values].reshape(batch, routes, length, values).to(w.dtype)


def _vector(width: int) -> int:
    """Channels that one load takes."""
    return width if width <= 2 else 4


def _table(x: Tensor) -> Tensor:
    """``[B, R, T, M]`` to float32 ``[B * R, T, M]`` of whole segments and whole vectors."""
    width = x.shape[3]
    extra = (0, -width % _vector(width), 0, -x.shape[2] % SEGMENT)
    return torch.nn.functional.pad(x.flatten(0, 1).float(), extra).contiguous()


def _with_margin(x: Tensor, plan: Plan) -> Tensor:
    """A copy of ``[H, T, M]`` that may be read up to a strip and a segment before its start."""
    margin = plan.strip + SEGMENT
    flat = torch.nn.functional.pad(x.flatten(0, 1), (0, 0, margin, 0))
    return flat[margin:].view_as(x)


def _workers(streams: int, length: int, strip: int, programs: int) -> int:
    """Enough workers a stream for so many programs, and no more than there are strips."""
    return max(1, min(math.ceil(length / strip), math.ceil(programs / max(1, streams))))


def forward_plan(streams: int, length: int) -> Plan:
    """Wide strips: the row sums over a strip's lanes are what costs."""
    return Plan(strip=256, workers=_workers(streams, length, 256, _PROGRAMS))


def backward_plan(streams: int, length: int) -> Plan:
    """Narrow strips: four rows of a strip are held in registers."""
    plan = Plan(strip=64, workers=_workers(streams, length, 64, 2 * _PROGRAMS), registers=128)
    marks = streams * plan.workers * (length // 4) * 2 * plan.strip * 4
    return plan._replace(dense=marks <= _DENSE_BYTES)


def _arguments(
    starts: Tensor | None, seed: Tensor | None, q: Tensor, plan: Plan, options: tuple[Any, ...]
) -> dict[str, Any]:
    """What both kernels take."""
    length, routes, gate, slope, bias, scan, utility, sharpness, offset, cap, _, dropout = options
    return {
        "starts_ptr": q if starts is None else starts.contiguous(),
        "seed_ptr": q if seed is None else seed,
        "T": q.shape[1],
        "length": length,
        "routes": routes,
        "slope": slope,
        "bias": bias,
        "sharp": sharpness * (UTILITY if utility else 1.0),
        "cap": float(cap),
        "threshold": threshold(dropout),
        "inverse": 1.0 / (1.0 - dropout),
        "M": q.shape[2],
        "CH": _vector(q.shape[2]),
        "BD": plan.strip,
        "W": plan.workers,
        "GATE": gate,
        "SCAN": scan,
        "UTILITY": utility,
        "OFFSET": offset,
        "CAPPED": cap > 0,
        "PACKED": starts is not None,
        "DROPOUT": dropout > 0,
        "num_warps": 1,
        "num_stages": 1,
        **({} if plan.registers is None or _interpreted() else {"maxnreg": plan.registers}),
    }


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
    from rosakit.ops.estimators.pairwise import kept_at

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
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """``y [H, T, V]`` and the base-2 log of each row's softmax sum ``[H, T]``."""
    from rosakit.ops.triton import kernels

    streams, length, values = w.shape
    shape = (streams, plan.workers, length)
    top = torch.full(shape, -1.0e30, device=q.device)
    total = torch.zeros(shape, device=q.device)
    out = torch.zeros((*shape, values), device=q.device)
    offset, dropout = options[8], options[11]
    if options[0] > offset:
        kernels.attend_forward[(streams * plan.workers,)](
            q_ptr=q,
            k_ptr=_with_margin(k, plan),
            w_ptr=_with_margin(w, plan),
            top_ptr=top,
            sum_ptr=total,
            out_ptr=out,
            V=values,
            CV=_vector(values),
            **_arguments(starts, seed, q, plan, options),
        )
    best = top.amax(1)
    z_null = _null_logit(starts, q, options) if offset else torch.full_like(best, -math.inf)
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
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k ``[H, T, M]``, w and null ``[H, T, V]``."""
    from rosakit.ops.triton import kernels

    streams, length, width = q.shape
    values = w.shape[2]
    real = _padding(starts, streams)
    g = (grad if real is None else grad * real).contiguous()
    delta = (g * y).sum(2)
    offset, dropout = options[8], options[11]

    def zeros(channels: int) -> Tensor:
        return torch.zeros((streams, plan.workers, length, channels), device=q.device)

    dq, dk, dw = zeros(width), zeros(width), zeros(values)
    programs = streams * plan.workers
    marks = length // (4 if plan.dense else SEGMENT) + SEGMENT // 4
    if options[0] > offset:
        kernels.attend_backward[(programs,)](
            q_ptr=q,
            k_ptr=_with_margin(k, plan),
            w_ptr=_with_margin(w, plan),
            g_ptr=g,
            lse_ptr=lse,
            delta_ptr=delta,
            dq_ptr=dq,
            dk_ptr=dk,
            dw_ptr=dw,
            mark_ptr=torch.empty((programs, marks, 2, plan.strip), device=q.device),
            tile_ptr=torch.zeros((programs, 2, SEGMENT, plan.strip + 32), device=q.device),
            V=values,
            CV=_vector(values),
            SEG=SEGMENT,
            DENSE=plan.dense,
            **_arguments(starts, seed, q, plan, options),
        )
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
    dropout: float,
) -> tuple[Tensor, Tensor]:
    options = (
        *(length, routes, gate, slope, bias, scan, utility),
        *(sharpness, offset, cap, min_length, dropout),
    )
    return forward(q, k, w, null, starts, seed, options, forward_plan(q.shape[0], length))


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
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (
        *(length, routes, gate, slope, bias, scan, utility),
        *(sharpness, offset, cap, min_length, dropout),
    )
    plan = backward_plan(q.shape[0], length)
    return backward(grad, q, k, w, null, y, lse, starts, seed, options, plan)


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
    return (*gradients, *[None] * 14)


_attend_op.register_autograd(_backward, setup_context=_setup_context)
