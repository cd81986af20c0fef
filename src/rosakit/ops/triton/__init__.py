"""Fused pairwise forms; importing this package imports no triton."""

from rosakit.ops.triton.engine import unavailable_reason
from rosakit.ops.triton.pairwise import attend_fused

__all__ = ["attend_fused", "unavailable_reason"]
