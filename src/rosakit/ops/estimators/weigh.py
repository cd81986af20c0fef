"""One door to the pairwise forms: fused kernels where they run, the dense form elsewhere."""

from __future__ import annotations

from torch import Tensor

from rosakit.errors import BackendError, warn_once
from rosakit.ops import triton
from rosakit.ops.estimators.blocks import attend_blocks
from rosakit.ops.estimators.pairwise import Form, attend_naive


def attend(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    *,
    seed: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`attend_naive` by the fastest way that is there.

    Args:
        fused: True: in memory linear in T, by the kernels or, where they cannot run a window,
            block by block, or an error; False: the dense form; None: linear memory on CUDA.

    Raises:
        BackendError: the kernels were asked for and cannot run.
    """
    if form.window >= q.shape[2]:  # sees everything
        form = form._replace(window=0)
    reason = triton.unavailable_reason(q.device, form, q.shape[-1], w.shape[-1])
    linear = q.device.type != "cpu" if fused is None else fused
    if form.window and linear and reason is not None:
        return attend_blocks(q, k, w, null, starts, form, seed)
    if fused is None:
        fused = linear and reason is None
        if q.device.type == "cuda" and reason is not None:
            warn_once(f"rosakit: {reason}, so pairs of positions are weighed in quadratic memory")
    if not fused:
        return attend_naive(q, k, w, null, starts, form, seed)
    if reason is not None:
        raise BackendError(f"fused=True, but {reason}; use fused=None or fused=False")
    return triton.attend_fused(q, k, w, null, starts, form, seed)
