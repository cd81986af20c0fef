"""The GPU engine: exact matching and fused retrieval in CUDA C++, compiled at first use.

Importing this package imports no CUDA library; `available()` finds out, once, whether it can run.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rosakit.cuda.credit import counterfactual_backward, pack, retrieve_forward

__all__ = [
    "available",
    "counterfactual_backward",
    "match",
    "pack",
    "retrieve_forward",
    "supports",
    "unavailable_reason",
]


def __getattr__(name: str) -> object:
    if name in ("counterfactual_backward", "pack", "retrieve_forward"):
        from rosakit.cuda import credit

        return getattr(credit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def unavailable_reason() -> str | None:
    """Why the GPU engine cannot run here, or None where it can."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (7, 0):
        return "the kernels need compute capability 7.0 or newer"
    from rosakit.cuda.compile import bindings_error

    reason = bindings_error()
    return None if reason is None else f"cuda-bindings cannot be used ({reason})"


def available() -> bool:
    """Whether the GPU engine can run: a CUDA device, and the `cuda` extra installed."""
    return unavailable_reason() is None


def supports(
    q: Tensor, *, granularity: str = "token", counterfactual_bits: int = 0, **_: object
) -> bool:
    """Whether the kernels take these symbols at this granularity (else the CPU core does)."""
    from rosakit.cuda.matcher import MAX_POSITIONS, SYMBOL_DTYPES

    narrow = q.dtype == SYMBOL_DTYPES[0]
    return (
        q.is_cuda
        and q.dtype in SYMBOL_DTYPES
        and (narrow or granularity == "token")
        and counterfactual_bits <= (8 if narrow else 16)
        and q.shape[-1] <= MAX_POSITIONS
    )


def match(
    q: Tensor,
    k: Tensor,
    *,
    granularity: str = "token",
    successor: str = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Tensor | None = None,
    counterfactual_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact suffix match on the GPU (semantics section 2), on the current stream, without a sync.

    Args:
        q, k: symbols ``[B, R, T]`` on one CUDA device: uint8, or at token granularity also uint16
            and int32 (nonnegative).
        granularity: "token" or "run".
        successor: "available" or "strict", for run granularity.
        segment_starts: int32 ``[B, T]`` on the same device, or None.
        counterfactual_bits: ``M`` in 0..8, with wide symbols 0..16.

    Returns:
        Position ``[B, R, T]``, length ``[B, R, T]`` and, for ``M > 0``, counterfactual positions
        ``[B, R, T, M]``; int32.

    Raises:
        InvalidTypeError, InvalidInputError: tensors or options that the kernels do not take.
        BackendError: the kernels cannot be compiled or launched.
    """
    from rosakit.cuda import matcher
    from rosakit.errors import InvalidInputError

    if granularity not in ("token", "run"):
        raise InvalidInputError(f"granularity must be 'token' or 'run', got {granularity!r}")
    matcher.check(q, k, segment_starts, counterfactual_bits, granularity)
    return matcher.match(
        q.contiguous(),
        k.contiguous(),
        granularity=granularity,
        successor=successor,
        max_length=max_length,
        min_length=min_length,
        segment_starts=None if segment_starts is None else segment_starts.contiguous(),
        counterfactual_bits=counterfactual_bits,
    )
