"""`suffix_attention`: hard forward, dense surrogate backward (semantics 3.3; rosa_soft, 2026-08).

The forward is the hard operator. The gradient is that of a softmax over *all* earlier positions:
with hard signs ``s(x)`` in {-1, +1}, mismatch fraction ``m = (1 - s(q) . s(k) / M) / 2``, gate
``a = exp(-mismatch_scale m)`` and evidence ``S[i, j] = a (1 + S[i-1, j-1])``, the logits are
``scale (sqrt(1 + S) - 1) / (sqrt(2) - 1) - log N_i`` and ``scale / 2`` for the null, and the
vector-Jacobian product of ``sum_j p_j v_{j+1}`` passes through the signs with slope
``1 / (1 + |x|)^2``. Derivation: docs/estimators/suffix_attention.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.ops.estimators.pairwise import Form
from rosakit.ops.estimators.registry import MatchOptions, register
from rosakit.ops.estimators.softened import hard_match, to_routes
from rosakit.ops.estimators.weigh import attend
from rosakit.ops.retrieve import retrieve
from rosakit.types import Match, Unmatched


@register("suffix_attention")
def suffix_attention(
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
    mismatch_scale: float = 3.0,
    scale: float = 1.0,
    window: int | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    fused: bool | None = None,
) -> tuple[Tensor, Match]:
    """Hard retrieval forward, surrogate attention backward.

    Args:
        q, k: ``[B, T, C]``.
        v: ``[B, T, C]``; see `rosakit.ops.value_heads` for heads that several routes read.
        e0, e1: ``[C]``; their gradients are those of the hard forward.
        mismatch_scale: how fast evidence decays with mismatched bits.
        scale: sharpness of the surrogate's softmax.
        window: evidence further back than this many symbols is ignored; None: `max_length` of the
            match, or no limit.
        dropout: share of the surrogate's weights dropped; the forward never sees it.
        seed: int64 ``[1]``, names the dropped weights; None: drawn from torch's generator.
        fused: the kernel that never materialises ``[T, T]``; None: where it can run.

    Returns:
        ``y [B, T, C]`` and the match that it read.

    Raises:
        InvalidInputError: an option out of range, or ``granularity="run"``.
    """
    _check(mismatch_scale, scale, window, dropout, match)
    found = hard_match(q, k, bits, match, "bits", "successor")
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    hard = retrieve(
        v.detach() if training else v,
        found.position,
        e0,
        e1,
        bits=bits,
        unmatched=unmatched,
        e_null=e_null,
    )
    if not training:
        return hard, found
    work = torch.promote_types(v.dtype, torch.float32)
    low, high = e0.detach().to(work), e1.detach().to(work)
    w = low + (high - low) * (_sign(v.to(work)) + 1) / 2
    null = None
    if unmatched == "self":
        null = w
    elif e_null is not None:
        null = e_null.detach().to(work).expand_as(w)
    form = Form(
        gate="exp",
        slope=mismatch_scale / (2 * bits),
        bias=-mismatch_scale / 2,
        recurrence="dp",
        score="utility",
        sharpness=scale,
        window=window or match.max_length or 0,
        dropout=dropout,
    )
    if dropout and seed is None:
        seed = torch.randint(2**31, (1,), device=q.device)
    soft = attend(
        to_routes(_sign(q.to(work)), bits),
        to_routes(_sign(k.to(work)), bits),
        to_routes(w, bits),
        None if null is None else to_routes(null, bits),
        match.segment_starts,
        form,
        seed=seed,
        fused=fused,
    )
    soft = soft.transpose(1, 2).flatten(2).to(v.dtype)
    return hard + (soft - soft.detach()), found


def _check(
    mismatch_scale: float, scale: float, window: int | None, dropout: float, match: MatchOptions
) -> None:
    if not (mismatch_scale > 0 and scale > 0):
        raise InvalidInputError(
            f"mismatch_scale and scale must be positive, got {mismatch_scale} and {scale}"
        )
    if window is not None and window < 1:
        raise InvalidInputError(f"window must be at least 1 or None, got {window}")
    if not 0 <= dropout < 1:
        raise InvalidInputError(f"dropout must be in [0, 1), got {dropout}")
    if match.granularity != "token":
        raise InvalidInputError(
            "suffix_attention compares symbols, not runs: use granularity='token', or the "
            "counterfactual estimator for granularity='run'"
        )


def _sign(x: Tensor) -> Tensor:
    """``x > 0`` as -1 or +1, with the slope ``1 / (1 + |x|)^2`` of softsign."""
    soft: Tensor = torch.nn.functional.softsign(x)
    hard = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    return hard + (soft - soft.detach())
