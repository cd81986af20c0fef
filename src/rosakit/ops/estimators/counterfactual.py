"""`counterfactual`: would the other value of this bit have read something better?

ROSA-Tuning's estimator (semantics 3.1). For every query position and bit ``m`` the operator also
finds the position that is read when bit ``m`` of the query's last symbol is flipped. The gradient
of the bit is the difference between what the two positions hold, weighted by the loss's slope.

With ``theta = g * (e1 - e0)``, ``vf`` the value read softly (``sigmoid(v)``) or as its hard bit,
and ``S(p) = sum_c theta[t, c] * vf[p, c]`` over the channels ``c`` of the route, a null giving 0::

    dq[t, m]  = p_q (1 - p_q) * (S(pos with bit 1) - S(pos with bit 0))
    dk[l*, m] = p_k (1 - p_k) * (sum over t of S(l) [pos^(m,1)(t) = l] - the same for bit 0)

Per bit one of the two positions is the factual one, so ``M + 1`` gathers of ``[B, R, T, M]`` do.

``stride > 1`` credits a sample of the query positions (`rosakit.ops.estimators.sampling`), each
counted `stride` times: `dq` and `dk` are the full ones on average; `dv` is exact.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.errors import InvalidInputError
from rosakit.ops import rows
from rosakit.ops.estimators.given import read_given
from rosakit.ops.estimators.registry import MatchOptions, register
from rosakit.ops.estimators.sampling import check_stride, sample_positions, sampled_mask
from rosakit.ops.retrieve import gpu_kernels, read, retrieve_backward
from rosakit.types import Match, Unmatched

KeyCredit = Literal["matched", "successor"]


@register("counterfactual")
def counterfactual(
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
    key_credit: KeyCredit = "matched",
    soft_values: bool = True,
    temperature: float = 1.0,
    stride: int = 1,
    seed: int = 0,
) -> tuple[Tensor, Match]:
    """Hard retrieval forward, counterfactual gradients backward.

    Args:
        q: ``[B, T, C]``.
        k: ``[B, T, C]``.
        v: ``[B, T, C]``.
        e0: ``[C]``.
        e1: ``[C]``.
        bits: bits per route.
        match: how streams are matched.
        unmatched: what a position without match reads.
        e_null: ``[C]`` for ``unmatched="null"``.
        key_credit: "matched" credits the key that was compared, "successor" the position that was
            read (the published rule).
        soft_values: contrast ``sigmoid(v)`` (default) or the hard bits.
        temperature: ``T`` of ``p = sigmoid(T x)`` for the slopes of q and k.
        stride: 1: every query position is credited. Larger: one of every `stride`, drawn from the
            bits of `q` and `seed`, counted `stride` times; the CPU finds flips at those only.
        seed: another seed draws other positions.

    Returns:
        ``y [B, T, C]`` and the match that it read.

    Raises:
        InvalidInputError: an unknown `key_credit`, a temperature that is not positive, or a
            stride below 1.
    """
    if key_credit not in ("matched", "successor"):
        raise InvalidInputError(f"key_credit must be 'matched' or 'successor', got {key_credit!r}")
    if not temperature > 0:
        raise InvalidInputError(f"temperature must be positive, got {temperature}")
    check_stride(stride)
    credit = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    sampled = sample_positions(q, stride, seed) if credit and stride > 1 else None
    if match.given is not None:
        return read_given(
            *(q, k, v, e0, e1, e_null, match.segment_starts, match.given, credit),
            (bits, match.granularity, unmatched, key_credit, soft_values, temperature),
            (sampled, stride),
        )
    y, position, length, cf = torch.ops.rosakit.counterfactual(
        q,
        k,
        v,
        e0,
        e1,
        e_null,
        match.segment_starts,
        bits,
        match.granularity,
        match.successor,
        match.max_length or 0,
        match.min_length,
        match.backend,
        unmatched,
        credit,
        key_credit,
        soft_values,
        temperature,
        sampled,
        stride,
    )
    return y, Match(position, length, cf if credit else None)


def credit_naive(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    position: Tensor,
    cf_position: Tensor,
    segment_starts: Tensor | None,
    *,
    bits: int,
    granularity: str,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """The definition above, line by line: ``dq, dk [B, T, C]``.

    Args:
        grad, q, k, v: ``[B, T, C]``.
        position: int32 ``[B, R, T]``.
        cf_position: int32 ``[B, R, T, M]``.
        sampled: int64 ``[B, n]``, the positions that are credited, each `stride` times; None for
            all of them.
    """
    batch, length, _ = q.shape
    work = torch.promote_types(grad.dtype, torch.float32)
    theta = rows.to_rows(grad.to(work) * (e1.to(work) - e0.to(work)), bits)
    value = v.to(work).sigmoid() if soft_values else symbols.binarize(v).to(work)
    value = rows.add_null_row(rows.to_rows(value, bits))
    sign = rows.to_rows(torch.where(q > 0, 1.0, -1.0).to(work), bits)  # +1: the factual bit is 1

    chosen = None if sampled is None else _sampled_rows(sampled, position)

    def pick(x: Tensor) -> Tensor:
        return x if chosen is None else x[chosen]

    theta, sign = pick(theta), pick(sign)
    read = pick(rows.row_index(rows.effective_position(position, unmatched)))
    factual = (theta * value[read]).sum(1)
    slope_q = torch.empty_like(theta)
    slope_k = value.new_empty(value.shape[0] - 1, bits)
    to_key = pick(_credited_rows(position, k, segment_starts, bits, granularity, key_credit))
    for m in range(bits):
        flipped_position = rows.effective_position(cf_position[..., m], unmatched)
        flipped_read = pick(rows.row_index(flipped_position))
        flipped = (theta * value[flipped_read]).sum(1)
        slope_q[:, m] = sign[:, m] * (factual - flipped)
        to_flipped_key = pick(
            _credited_rows(cf_position[..., m], k, segment_starts, bits, granularity, key_credit)
        )
        count = slope_k.shape[0]
        slope_k[:, m] = rows.scatter_rows(sign[:, m] * factual, to_key, count) - rows.scatter_rows(
            sign[:, m] * flipped, to_flipped_key, count
        )
    if chosen is not None:
        slope_q = rows.scatter_rows(stride * slope_q, chosen, slope_k.shape[0])
        slope_k = stride * slope_k
    dq = rows.from_rows(slope_q, batch, length) * _slope(q, temperature, work)
    dk = rows.from_rows(slope_k, batch, length) * _slope(k, temperature, work)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous()


def _sampled_rows(sampled: Tensor, position: Tensor) -> Tensor:
    """Rows of the sampled positions of every route, ascending: int64 ``[B * R * n']``."""
    batch, routes, length = position.shape
    base = torch.arange(batch * routes, device=position.device).view(batch, routes, 1) * length
    index = (base + sampled[:, None]).flatten()
    inside = (sampled < length)[:, None].expand(batch, routes, -1).flatten()
    return index[inside]


def _slope(x: Tensor, temperature: float, work: torch.dtype) -> Tensor:
    p = (temperature * x.to(work)).sigmoid()
    return p * (1 - p)


def _credited_rows(
    position: Tensor,
    k: Tensor,
    segment_starts: Tensor | None,
    bits: int,
    granularity: str,
    key_credit: str,
) -> Tensor:
    """Rows ``[B * R * T]`` of the key that a match at `position` credits."""
    if key_credit == "successor":
        return rows.row_index(position)
    if granularity == "token":
        return rows.row_index(torch.where(position > 0, position - 1, -1))
    starts = _run_starts(symbols.pack(k, bits), segment_starts)
    before = starts.gather(2, (position - 1).clamp(min=0).to(torch.int64))
    return rows.row_index(torch.where(position > 0, before, -1))


def _starts_run(key_symbols: Tensor, segment_starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where a key run starts, bool ``[B, R, T]``, and every position's own index, int32 ``[T]``."""
    if key_symbols.dtype == torch.uint16:
        key_symbols = key_symbols.to(torch.int32)
    own = torch.arange(key_symbols.shape[-1], device=key_symbols.device, dtype=torch.int32)
    new = torch.ones_like(key_symbols, dtype=torch.bool)
    new[..., 1:] = key_symbols[..., 1:] != key_symbols[..., :-1]
    if segment_starts is not None:
        new |= (segment_starts == own)[:, None]
    return new, own


def _run_starts(key_symbols: Tensor, segment_starts: Tensor | None) -> Tensor:
    """For every position the start of the key run that holds it, int32 ``[B, R, T]``."""
    new, own = _starts_run(key_symbols, segment_starts)
    return torch.where(new, own, 0).cummax(dim=-1).values.to(torch.int32)


def _credit_sources(key_symbols: Tensor, segment_starts: Tensor | None) -> Tensor:
    """For every run start the start of the next run, whose credit it takes; else -1.

    The inverse of what `_credited_rows` looks up, as the fused kernel wants it.
    """
    new, own = _starts_run(key_symbols, segment_starts)
    end = key_symbols.shape[-1]
    later = torch.full_like(new, end, dtype=torch.int32)
    later[..., :-1] = torch.where(new, own, end)[..., 1:]
    following = later.flip(-1).cummin(dim=-1).values.flip(-1)
    return torch.where(new & (following < end), following, -1).to(torch.int32)


# --- the operator ------------------------------------------------------------------------------


@torch.library.custom_op("rosakit::counterfactual", mutates_args=())
def _counterfactual_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    credit: bool,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = gpu_kernels(v, e0, bits)
    pack = symbols.pack if kernels is None else kernels.pack
    position, length, cf = torch.ops.rosakit.suffix_match(
        pack(q, bits),
        pack(k, bits),
        segment_starts,
        granularity,
        successor,
        max_length,
        min_length,
        bits if credit else 0,
        backend,
        None if sampled is None else sampled_mask(sampled, q.shape[1]),
    )
    y = read(v, position, e0, e1, e_null, bits, unmatched)
    return y, position, length, cf


@_counterfactual_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    segment_starts: Tensor | None,
    bits: int,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    backend: str,
    unmatched: str,
    credit: bool,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = q.shape
    shape = (batch, channels // bits, length)
    position = q.new_empty(shape, dtype=torch.int32)
    cf = q.new_empty((*shape, bits if credit else 0), dtype=torch.int32)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, position, torch.empty_like(position), cf


@torch.library.custom_op("rosakit::counterfactual_backward", mutates_args=())
def _counterfactual_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    position: Tensor,
    cf_position: Tensor,
    segment_starts: Tensor | None,
    bits: int,
    granularity: str,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = gpu_kernels(v, e0, bits)
    if kernels is not None and cf_position.shape[-1]:
        sources = None
        if granularity == "run" and key_credit == "matched":
            sources = _credit_sources(kernels.pack(k, bits), segment_starts)
        fused: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = (
            kernels.counterfactual_backward(
                grad,
                q,
                k,
                v,
                e0,
                e1,
                position,
                cf_position,
                bits=bits,
                unmatched=unmatched,
                key_credit=key_credit,
                credit_from=sources,
                soft_values=soft_values,
                temperature=temperature,
            )
        )
        if sampled is None:
            return fused
        # Elsewhere a flip reads what the match reads, which the kernel gives no credit.
        dq, dk = fused[0] * stride, fused[1] * stride
        return dq, dk, *fused[2:]
    dv, de0, de1, de_null = retrieve_backward(grad, v, position, e0, e1, bits, unmatched)
    if cf_position.shape[-1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), dv, de0, de1, de_null
    dq, dk = credit_naive(
        grad,
        q,
        k,
        v,
        e0,
        e1,
        position,
        cf_position,
        segment_starts,
        bits=bits,
        granularity=granularity,
        unmatched=unmatched,
        key_credit=key_credit,
        soft_values=soft_values,
        temperature=temperature,
        sampled=sampled,
        stride=stride,
    )
    return dq, dk, dv, de0, de1, de_null


@_counterfactual_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    position: Tensor,
    cf_position: Tensor,
    segment_starts: Tensor | None,
    bits: int,
    granularity: str,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    sampled: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    work = torch.promote_types(grad.dtype, torch.float32)
    return like(q), like(k), like(v), like(e0), like(e1), e0.new_empty(e0.shape, dtype=work)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, e0, e1, e_null, segment_starts, bits, granularity = inputs[:9]
    _, position, length, cf = output
    ctx.mark_non_differentiable(position, length, cf)
    ctx.save_for_backward(q, k, v, e0, e1, position, cf, segment_starts, inputs[18])
    ctx.null_dtype = None if e_null is None else e_null.dtype
    ctx.options, ctx.stride = (bits, granularity, inputs[13], *inputs[15:18]), inputs[19]


def _backward(ctx, grad, *_: Any):  # type: ignore[no-untyped-def]
    *tensors, sampled = ctx.saved_tensors
    dq, dk, dv, de0, de1, de_null = torch.ops.rosakit.counterfactual_backward(
        grad, *tensors, *ctx.options, sampled, ctx.stride
    )
    de_null = None if ctx.null_dtype is None else de_null.to(ctx.null_dtype)
    return dq, dk, dv, de0, de1, de_null, *[None] * 14


_counterfactual_op.register_autograd(_backward, setup_context=_setup_context)
