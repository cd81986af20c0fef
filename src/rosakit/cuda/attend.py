"""Launching the pairwise forms (docs/estimators/fused.md); tables as `rosakit.ops.triton` lays out.

The dense torch form that these kernels are tested against is
`rosakit.ops.estimators.pairwise.attend_naive`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rosakit.cuda import compile

_HELD = 4  # as in diagonals.cuh, and so GROUP
GROUP = 2 * _HELD
"""Rows between two states that the backward pass stores."""

_GATES = {"sigmoid": 0, "identity": 1, "exp": 2}
_ORDER = ("T", "length", "routes", "workers", "window")
_REALS = ("slope", "bias", "sharp", "cap", "peak")
_SWITCHES = ("SCAN", "UTILITY", "OFFSET", "CAPPED", "PACKED", "DROPOUT", "WINDOWED")

# By the channels of a key and its value together: diagonals a lane and warps a multiprocessor, as
# measured on an H100, with a window on an H200 (docs/estimators/fused.md). A window of keys and its
# sums live in registers; evidence of a window holds the keys that leave it as well.
_SIZES = {
    # (backward, windowed): (most channels, diagonals a lane, warps a multiprocessor), ...
    (False, False): ((8, 8, 12), (16, 4, 12), (32, 2, 12)),
    (True, False): ((8, 2, 16), (16, 2, 12), (32, 1, 12)),
    (False, True): ((8, 4, 16), (16, 4, 12), (32, 2, 12)),
    (True, True): ((8, 2, 12), (16, 1, 12), (32, 1, 12)),
}


def diagonals(q: Tensor, w: Tensor, form: Mapping[str, Any], *, backward: bool) -> int:
    """Diagonals a lane."""
    return _chosen(q, w, form, backward)[0]


def _chosen(q: Tensor, w: Tensor, form: Mapping[str, Any], backward: bool) -> tuple[int, int]:
    channels = q.shape[2] + w.shape[2]
    sizes = _SIZES[backward, bool(form["windowed"])]
    return next((lanes, resident) for most, lanes, resident in sizes if channels <= most)


def workers(q: Tensor, w: Tensor, form: Mapping[str, Any], *, backward: bool) -> int:
    """Workers a stream: whole waves of warps, as nearly as it goes, and never more than strips."""
    per_lane, resident = _chosen(q, w, form, backward)
    count = torch.cuda.get_device_properties(q.device).multi_processor_count * resident
    return balanced(q.shape[0], -(-int(form["length"]) // (32 * per_lane)), count)


def balanced(streams: int, strips: int, resident: int) -> int:
    """How many workers a stream leave the fewest of `resident` places empty in the last wave."""

    def filled(each: int) -> float:
        programs = streams * each
        return programs / (-(-programs // resident) * resident)

    most = max(1, min(strips, -(-resident // max(1, streams)) + 1))
    return max(range(1, most + 1), key=lambda each: (round(filled(each), 2), -each))


def macros(q: Tensor, w: Tensor, form: Mapping[str, Any], *, backward: bool) -> dict[str, int]:
    """What a kernel is compiled for: sizes, switches of the form, registers."""
    per_lane, resident = _chosen(q, w, form, backward)
    return {
        "M": q.shape[2],
        "V": w.shape[2],
        "P": per_lane,
        "RESIDENT": resident,
        "GATE": _GATES[form["gate"]],
        **{name: int(form[name.lower()]) for name in _SWITCHES},
    }


def permuted(x: Tensor, per_lane: int) -> Tensor:
    """``[H, T, N]`` with row ``j`` at ``(j mod P) * (T / P) + j / P``."""
    columns: Tensor = x.unflatten(1, (-1, per_lane))
    return columns.transpose(1, 2).contiguous()


def numbers(form: Mapping[str, Any], workers: int) -> list[compile.Argument]:
    """The kernels' arguments after the pointers."""
    whole = [(int({**form, "workers": workers}[name]), ctypes.c_int32) for name in _ORDER]
    real = [(float(form[name]), ctypes.c_float) for name in _REALS]
    return [
        *whole,
        *real,
        compile.unsigned(form["threshold"]),
        (float(form["inverse"]), ctypes.c_float),
    ]


def forward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    top: Tensor,
    total: Tensor,
    out: Tensor,
    form: Mapping[str, Any],
) -> None:
    """Softmax statistics over every worker's strips, into `top`, `total` and `out`.

    Args:
        q, k: float32 ``[H, T, M]``; w: ``[H, T, V]``.
        top, total: ``[H, W, T]``; out: ``[H, W, T, V]``.
        form: gate, slope, bias and the others of `_SWITCHES`, `_REALS` and `_ORDER`.
    """
    per_lane = diagonals(q, w, form, backward=False)
    kernel = _kernel(q, w, form, backward=False)
    kept = [q.contiguous(), permuted(k, per_lane), permuted(w, per_lane), starts, seed]
    arguments = [compile.pointer(x) for x in (*kept, top, total, out)]
    workers = top.shape[1]
    kernel.launch((q.shape[0] * workers, 1, 1), 32, 0, arguments + numbers(form, workers))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    lse: Tensor,
    delta: Tensor,
    starts: Tensor | None,
    seed: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    form: Mapping[str, Any],
) -> None:
    """Adds every worker's share to `gradients` ``[H, W, T, ...]`` of q, k and w."""
    per_lane = diagonals(q, w, form, backward=True)
    kernel = _kernel(q, w, form, backward=True)
    workers = gradients[0].shape[1]
    marks = torch.empty(marks_size(q, w, workers, form), device=q.device)
    ring = torch.empty(ring_size(q, w, workers, form), device=q.device)
    kept = [q.contiguous(), permuted(k, per_lane), permuted(w, per_lane), grad.contiguous()]
    kept += [lse.contiguous(), delta.contiguous()]
    arguments = [compile.pointer(x) for x in (*kept, starts, seed, *gradients, marks, ring)]
    shared = _HELD * (q.shape[2] + w.shape[2]) * 4
    kernel.launch((q.shape[0] * workers, 1, 1), 32, shared, arguments + numbers(form, workers))


def marks_size(q: Tensor, w: Tensor, workers: int, form: Mapping[str, Any]) -> int:
    """Numbers that the states of all strips in work take: linear in T."""
    per_lane = diagonals(q, w, form, backward=True)
    states = (2 if form["scan"] or form["windowed"] else 1) * per_lane
    return q.shape[0] * workers * (q.shape[1] // GROUP + 1) * 32 * states


def ring_size(q: Tensor, w: Tensor, workers: int, form: Mapping[str, Any]) -> int:
    """Numbers that the last `window` rows of all strips in work take on the way up."""
    per_lane = diagonals(q, w, form, backward=True)
    return q.shape[0] * workers * int(form["window"]) * 32 * per_lane


def _kernel(q: Tensor, w: Tensor, form: Mapping[str, Any], *, backward: bool) -> compile.Kernel:
    name = "attend_backward" if backward else "attend_forward"
    with torch.cuda.device(q.device):
        chosen = macros(q, w, form, backward=backward)
        return compile.load(("diagonals.cuh", f"{name}.cu"), (name,), chosen, q.device)[name]
