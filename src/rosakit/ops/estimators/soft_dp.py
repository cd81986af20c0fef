"""`soft_dp`: the suffix match as a differentiable dynamic programme (rosa_soft, 2025-10-26).

Soft symbol equality ``a[i, j]``, soft match lengths ``x[i, j] = a[i, j] (x[i-1, j-1] + 1)``, a
softmax over them, and an average of soft values. The forward is soft; it converges to the hard
operator as ``tau -> 0``. Derivation: docs/estimators/soft.md.
"""

from __future__ import annotations

from torch import Tensor

from rosakit.ops.estimators.registry import MatchOptions, register
from rosakit.ops.estimators.softened import Align, Mode, softened
from rosakit.types import Match, Unmatched


@register("soft_dp", softened=True)
def soft_dp(
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
        "dp",
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
