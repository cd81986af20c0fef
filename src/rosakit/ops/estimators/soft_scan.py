"""`soft_scan`: soft run lengths by cumulative sum and maximum (rosa_soft, 2025-10-30).

Soft symbol equality ``a``; along each diagonal ``t = cumsum(a)`` and ``x = t - cummax(t (1 - a))``,
which for ``a`` in {0, 1} is the run length. The rest is `soft_dp`. Unlike the dynamic programme,
``x`` depends on everything since the start of the diagonal: a half-equal pair late in a stream
resets more than an early one. Derivation: docs/estimators/soft.md.
"""

from __future__ import annotations

from torch import Tensor

from rosakit.ops.estimators.registry import MatchOptions, register
from rosakit.ops.estimators.softened import Align, Mode, softened
from rosakit.types import Match, Unmatched


@register("soft_scan", softened=True)
def soft_scan(
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
    tau: float | None = 0.1,
    mode: Mode = "bits",
    align: Align = "successor",
    straight_through: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Match]:
    """Soft forward and backward; options as in `rosakit.ops.estimators.softened.softened`."""
    return softened(
        "scan",
        q,
        k,
        v,
        e0,
        e1,
        bits=bits,
        match=match,
        unmatched=unmatched,
        e_null=e_null,
        tau=tau,
        mode=mode,
        align=align,
        straight_through=straight_through,
        fused=fused,
    )
