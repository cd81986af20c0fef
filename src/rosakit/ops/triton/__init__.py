"""Fused Triton kernels of the softened estimators; importing this package imports no triton."""

from rosakit.ops.triton.pairwise import attend_fused, unavailable_reason

__all__ = ["attend_fused", "unavailable_reason"]
