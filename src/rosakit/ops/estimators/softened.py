"""The soft forward that `soft_dp` and `soft_scan` share (semantics 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.errors import InvalidInputError
from rosakit.ops.estimators.pairwise import Form, Recurrence, candidates, recur
from rosakit.ops.estimators.registry import MatchOptions
from rosakit.ops.estimators.weigh import attend
from rosakit.ops.retrieve import retrieve
from rosakit.types import NO_MATCH, Match, Unmatched

Mode = Literal["bits", "onehot"]
Align = Literal["successor", "self"]


def softened(
    recurrence: Recurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: Unmatched,
    e_null: Tensor | None,
    tau: float | None,
    mode: Mode,
    align: Align,
    straight_through: bool,
    fused: bool | None,
) -> tuple[Tensor, Match]:
    """Soft matching at temperature `tau`.

    Args:
        recurrence: "dp" or "scan"; see `rosakit.ops.estimators.pairwise`.
        q, k, v: ``[B, T, C]``.
        e0, e1: ``[C]``.
        tau: temperature, > 0. None: the hard forward of semantics section 2, whose only gradients
            are those of `v`, `e0` and `e1`.
        mode: "bits": a route's channels are bits, ``a = sigmoid((tanh(q / tau) . tanh(k / tau) -
            (M - 1)(1 - tau)) / tau)``, values ``sigmoid(v / tau)``. "onehot": they are the scores
            of ``M`` symbols, ``a = softmax(q / tau) . softmax(k / tau)``, values
            ``softmax(v / tau)``.
        align: "successor": keys ``j < i``, value ``j + 1``, a null for `unmatched`. "self"
            (October 2025): keys ``j <= i``, value ``j``, own value where nothing matches.
        straight_through: the forward is the hard one, the gradient that of the soft one.
        fused: the kernel that never materialises ``[T, T]``; None: where it can run.

    Returns:
        ``y [B, T, C]`` and the hard match of the same symbols.

    Raises:
        InvalidInputError: an option that does not exist, or does not fit the match options.
    """
    _check(tau, mode, align, unmatched, match)
    found = hard_match(q, k, bits, match, mode, align)
    hard = None
    if tau is None or straight_through:
        chosen = v if mode == "bits" else _one_hot(v, bits)
        position = found.position
        hard = retrieve(chosen, position, e0, e1, bits=bits, unmatched=unmatched, e_null=e_null)
    if tau is None:
        assert hard is not None
        return hard, found
    work = torch.promote_types(v.dtype, torch.float32)
    w = e0.to(work) + (e1.to(work) - e0.to(work)) * _soft_values(v.to(work), bits, tau, mode)
    null = None
    if unmatched == "self":
        null = w
    elif e_null is not None:
        null = e_null.to(work).expand_as(w)
    form = Form(
        gate="sigmoid" if mode == "bits" else "identity",
        slope=1 / tau if mode == "bits" else 1.0,
        bias=-(bits - 1) * (1 - tau) / tau if mode == "bits" else 0.0,
        recurrence=recurrence,
        score="length",
        sharpness=1 / tau,
        offset=1 if align == "successor" else 0,
        cap=match.max_length or 0,
        min_length=match.min_length,
    )
    y = attend(
        to_routes(_soft_symbols(q.to(work), bits, tau, mode), bits),
        to_routes(_soft_symbols(k.to(work), bits, tau, mode), bits),
        to_routes(w, bits),
        None if null is None or align == "self" else to_routes(null, bits),
        match.segment_starts,
        form,
        fused=fused,
    )
    soft = y.transpose(1, 2).flatten(2).to(v.dtype)
    if hard is not None:
        # In this order the sum is the hard output itself, not a rounding away from it.
        soft = hard.detach() + (soft - soft.detach())
    return soft, found


def _check(tau: float | None, mode: str, align: str, unmatched: str, match: MatchOptions) -> None:
    if tau is not None and not tau > 0:
        raise InvalidInputError(f"tau must be positive, or None for the hard mode; got {tau}")
    if mode not in ("bits", "onehot"):
        raise InvalidInputError(f"mode must be 'bits' or 'onehot', got {mode!r}")
    if align not in ("successor", "self"):
        raise InvalidInputError(f"align must be 'successor' or 'self', got {align!r}")
    if match.granularity != "token":
        raise InvalidInputError(
            "soft estimators compare symbols, not runs: use granularity='token', or the "
            "counterfactual estimator for granularity='run'"
        )
    if align == "self" and (unmatched != "self" or match.min_length != 1):
        raise InvalidInputError(
            "align='self' reads the own value where nothing matches: it needs unmatched='self' "
            f"and min_length=1, got unmatched={unmatched!r} and min_length={match.min_length}"
        )


def to_routes(x: Tensor, width: int) -> Tensor:
    """``[B, T, R * width]`` to ``[B, R, T, width]``."""
    grouped: Tensor = x.unflatten(2, (-1, width))
    return grouped.transpose(1, 2)


def _grouped(x: Tensor, bits: int) -> Tensor:
    grouped: Tensor = x.unflatten(-1, (-1, bits))
    return grouped


def _soft_symbols(x: Tensor, bits: int, tau: float, mode: Mode) -> Tensor:
    if mode == "bits":
        return (x / tau).tanh()
    return (_grouped(x, bits) / tau).softmax(-1).flatten(-2)


def _soft_values(v: Tensor, bits: int, tau: float, mode: Mode) -> Tensor:
    if mode == "bits":
        return (v / tau).sigmoid()
    return (_grouped(v, bits) / tau).softmax(-1).flatten(-2)


def _one_hot(x: Tensor, bits: int) -> Tensor:
    """+1 at a route's largest channel and -1 elsewhere, as real values whose bits are one-hot."""
    grouped = _grouped(x, bits)
    hot = torch.nn.functional.one_hot(grouped.argmax(-1), bits).to(x.dtype)
    return (2 * hot - 1).flatten(-2)


def hard_match(
    q: Tensor, k: Tensor, bits: int, match: MatchOptions, mode: Mode, align: Align
) -> Match:
    """The hard match of the symbols; with ``align="self"`` its position is that of the key."""
    if mode == "bits":
        q_symbols, k_symbols = symbols.pack(q, bits), symbols.pack(k, bits)
    else:
        q_symbols, k_symbols = (
            _grouped(x, bits).argmax(-1).to(torch.uint8).transpose(1, 2).contiguous()
            for x in (q, k)
        )
    if align == "self":
        return _match_self(q_symbols, k_symbols, match)
    position, length, _ = torch.ops.rosakit.suffix_match(
        q_symbols,
        k_symbols,
        match.segment_starts,
        match.granularity,
        match.successor,
        match.max_length or 0,
        match.min_length,
        0,
        match.backend,
    )
    return Match(position, length)


def _match_self(q: Tensor, k: Tensor, match: MatchOptions) -> Match:
    """Longest agreement with a key ``j <= i``, the latest such; quadratic, for fidelity only."""
    length = q.shape[2]
    allowed, _ = candidates(match.segment_starts, length, 0, q.device)
    equal = (q[..., :, None] == k[..., None, :]) & allowed
    x = recur(equal.to(torch.int32), allowed, "dp")
    if match.max_length is not None:
        x = x.clamp(max=match.max_length)
    order = (x.long() * length + torch.arange(length, device=q.device)).masked_fill(x == 0, -1)
    best, at = order.max(-1)
    null = best < 0
    found = x.gather(-1, at[..., None])[..., 0]
    return Match(torch.where(null, NO_MATCH, at).to(torch.int32), torch.where(null, 0, found).int())
