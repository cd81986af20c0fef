"""The engines that run the pairwise kernels: CUDA C++ (`rosakit.cuda.attend`) and Triton."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rosakit.cuda import attend as cuda_attend
from rosakit.cuda import compile
from rosakit.ops.estimators.pairwise import UTILITY, Form, threshold

MAX_WIDTH = 16
SEGMENT = 16  # rows a segment
_PROGRAMS = 2112  # 16 warps on each of 132 multiprocessors
_DENSE_BYTES = 5 << 29  # 2.5 GiB: what the backward may spend on marks to save a march
_BINDINGS_ERROR = compile.bindings_error()  # a value, since no graph can trace the look-up


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
    if form.window and (form.gate, form.recurrence, form.offset) != ("exp", "dp", 1):
        return "the fused kernels take a window with the gate of suffix_attention only"
    if width > MAX_WIDTH or values > MAX_WIDTH:
        return f"the fused kernels take at most {MAX_WIDTH} channels a route"
    if device.type != "cuda" and not _interpreted():
        return f"the fused kernels run on CUDA devices, not on {device.type}"
    if device.type == "cuda" and _BINDINGS_ERROR is None:
        return None
    return _missing()


def vector(width: int) -> int:
    """Channels that one load takes."""
    return width if width <= 2 else 4


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


def description(q: Tensor, packed: bool, options: tuple[Any, ...]) -> dict[str, Any]:
    """The form in the words of both engines."""
    length, routes, gate, slope, bias, scan, utility, sharpness, offset, cap = options[:10]
    window, dropout = options[11:]
    return {
        "T": q.shape[1],
        "length": length,
        "routes": routes,
        "gate": gate,
        "slope": slope,
        "bias": bias,
        "peak": -bias / slope,  # the product where the gate is 1
        "scan": scan,
        "utility": utility,
        "offset": offset,
        "sharp": sharpness * (UTILITY if utility else 1.0),
        "cap": float(cap),
        "capped": cap > 0,
        "window": window,
        "windowed": window > 0,
        "packed": packed,
        "dropout": dropout > 0,
        "threshold": threshold(dropout),
        "inverse": 1.0 / (1.0 - dropout),
    }


_NUMBERS = (
    *("T", "length", "routes", "window", "slope", "bias", "sharp", "cap", "peak"),
    *("threshold", "inverse"),
)
_SWITCHES = ("gate", "scan", "utility", "offset", "capped", "packed", "dropout", "windowed")


def _arguments(
    starts: Tensor | None, seed: Tensor | None, q: Tensor, plan: Plan, form: dict[str, Any]
) -> dict[str, Any]:
    """What both Triton kernels take."""
    return {
        "starts_ptr": q if starts is None else starts,
        "seed_ptr": q if seed is None else seed,
        **{name: form[name] for name in _NUMBERS},
        **{name.upper(): form[name] for name in _SWITCHES},
        "M": q.shape[2],
        "CH": vector(q.shape[2]),
        "BD": plan.strip,
        "W": plan.workers,
        "num_warps": 1,
        "num_stages": 1,
        **({} if plan.registers is None or _interpreted() else {"maxnreg": plan.registers}),
    }


class Engine(Protocol):
    """Runs the two kernels; `forward` and `backward` below do the rest."""

    def workers(self, q: Tensor, w: Tensor, form: dict[str, Any], *, backward: bool) -> int:
        """Workers a stream."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        starts: Tensor | None,
        seed: Tensor | None,
        top: Tensor,
        total: Tensor,
        out: Tensor,
        form: dict[str, Any],
    ) -> None:
        """Softmax statistics ``[H, W, T]`` and weighted values ``[H, W, T, V]``."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        lse: Tensor,
        delta: Tensor,
        starts: Tensor | None,
        seed: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor],
        form: dict[str, Any],
    ) -> None:
        """Adds to the gradients ``[H, W, T, ...]`` of q, k and w."""
        ...


class TritonEngine:
    """The Triton kernels: where the CUDA bindings are missing, and in Triton's interpreter."""

    def workers(self, q: Tensor, w: Tensor, form: dict[str, Any], *, backward: bool) -> int:
        plan = backward_plan if backward else forward_plan
        return plan(q.shape[0], form["length"]).workers

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        starts: Tensor | None,
        seed: Tensor | None,
        top: Tensor,
        total: Tensor,
        out: Tensor,
        form: dict[str, Any],
    ) -> None:
        from rosakit.ops.triton import kernels

        plan = forward_plan(q.shape[0], form["length"])
        kernels.attend_forward[(q.shape[0] * plan.workers,)](
            q_ptr=q,
            k_ptr=_with_margin(k, plan),
            w_ptr=_with_margin(w, plan),
            top_ptr=top,
            sum_ptr=total,
            out_ptr=out,
            V=w.shape[2],
            CV=vector(w.shape[2]),
            **_arguments(starts, seed, q, plan, form),
        )

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        w: Tensor,
        lse: Tensor,
        delta: Tensor,
        starts: Tensor | None,
        seed: Tensor | None,
        gradients: tuple[Tensor, Tensor, Tensor],
        form: dict[str, Any],
    ) -> None:
        from rosakit.ops.triton import kernels

        plan = backward_plan(q.shape[0], form["length"])
        programs = q.shape[0] * plan.workers
        marks = q.shape[1] // (4 if plan.dense else SEGMENT) + SEGMENT // 4
        kernels.attend_backward[(programs,)](
            q_ptr=q,
            k_ptr=_with_margin(k, plan),
            w_ptr=_with_margin(w, plan),
            g_ptr=grad,
            lse_ptr=lse,
            delta_ptr=delta,
            dq_ptr=gradients[0],
            dk_ptr=gradients[1],
            dw_ptr=gradients[2],
            mark_ptr=torch.empty((programs, marks, 2, plan.strip), device=q.device),
            tile_ptr=torch.zeros((programs, 2, SEGMENT, plan.strip + 32), device=q.device),
            ring_ptr=torch.empty((programs, form["window"], plan.strip), device=q.device),
            V=w.shape[2],
            CV=vector(w.shape[2]),
            SEG=SEGMENT,
            DENSE=plan.dense,
            **_arguments(starts, seed, q, plan, form),
        )


def engine_for(device: torch.device) -> Engine:
    """CUDA C++ where its bindings load, Triton elsewhere."""
    if device.type == "cuda" and _BINDINGS_ERROR is None:
        return cuda_attend
    return TritonEngine()
