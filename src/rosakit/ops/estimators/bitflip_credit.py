"""Credit of every bit: the definition, and who computes it faster.

`credit_naive` is the definition. The CPU core and the GPU kernel do all flips of a stream in one
sweep (docs/estimators/bitflip.md); run granularity and symbols that they do not take are left to
the naive form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosakit import cuda, symbols
from rosakit.errors import warn_once
from rosakit.native import bitflip as native_bitflip
from rosakit.ops.estimators.registry import MatchOptions
from rosakit.ops.retrieve import retrieve_forward

_COPIES = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Channels of flipped copies that the naive form matches at once: a GPU waits for small ones."""

SWEEP_FLIPS = 32
"""A sweep over all flips of ``T`` positions costs about as much as matching ``T / SWEEP_FLIPS``
flipped streams again (H200, 512 routes of 4 bits: ``T / 32`` at 2048, ``T / 19`` at 16384).
"""

NONE, QUERY_KEY, STREAM = "none", "qk", "qkv"
"""Which of q, k and v are one tensor, so that a flip of a bit flips it in all of them."""


def credit_naive(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: str,
    tied: str = NONE,
    phases: tuple[int, ...] = (0,),
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """The definition: flip, match again, read again, take the difference.

    Every route flips the same place and bit at once, since routes are independent.

    Args:
        grad: ``[B, T, C]``.
        tied: "none", or "qk" or "qkv" for tensors that are one.
        phases, stride: flip only coordinates ``u * M + m = phase (mod stride)``; each counts
            ``stride / len(phases)``.

    Returns:
        Credit of q and of k ``[B, T, C]``; with `tied` the joint credit, and zeros.
    """
    batch, length, channels = q.shape
    work = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(work)
    streams = (q > 0, k > 0, v > 0)
    now = _read(streams, e0, e1, e_null, bits, match, unmatched, work)
    shape = (batch, length * bits, channels // bits)
    out = [torch.zeros(shape, dtype=work, device=q.device) for _ in "qk"]
    flips = torch.cat([torch.arange(p, length * bits, stride) for p in phases]).to(q.device)
    weight = stride / len(phases)
    per_call = max(1, _COPIES.get(q.device.type, 1 << 22) // max(1, q.numel()))
    flipped_together = {NONE: ((0,), (1,)), QUERY_KEY: ((0, 1),), STREAM: ((0, 1, 2),)}[tied]
    for some in flips.split(per_call):
        mask = torch.zeros(len(some), length, 1, bits, dtype=torch.bool, device=q.device)
        mask[torch.arange(len(some), device=q.device), some // bits, 0, some % bits] = True
        mask = mask.expand(-1, -1, channels // bits, -1).flatten(2)[:, None]
        for together, credit in zip(flipped_together, out, strict=False):
            flipped = tuple(
                x ^ mask if n in together else x.expand(len(some), *x.shape)
                for n, x in enumerate(streams)
            )
            y = _read(flipped, e0, e1, e_null, bits, match, unmatched, work)
            by_route = ((y - now) * g).unflatten(-1, (-1, bits)).sum((2, 4))  # [n, B, R]
            credit.index_add_(1, some, by_route.transpose(0, 1) * weight)
    return tuple(  # type: ignore[return-value]
        x.view(batch, length, bits, -1).transpose(2, 3).flatten(2) for x in out
    )


def _read(
    streams: tuple[Tensor, ...],
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    match: MatchOptions,
    unmatched: str,
    dtype: torch.dtype,
) -> Tensor:
    """The hard output of boolean channels ``[(n,) B, T, C]``."""
    lead = streams[0].shape[:-2]
    q, k, v = (x.flatten(0, -3) for x in streams)
    starts = match.segment_starts
    if starts is not None and len(lead) > 1:
        starts = starts.repeat(lead[0], 1)
    position, _, _ = torch.ops.rosakit.suffix_match(
        symbols.pack(q, bits),
        symbols.pack(k, bits),
        starts,
        match.granularity,
        match.successor,
        match.max_length or 0,
        match.min_length,
        0,
        match.backend,
    )
    y = retrieve_forward(v.to(dtype), position, e0, e1, e_null, bits, unmatched)
    return y.view(*lead, *y.shape[1:])


def credit_core(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: str,
    tied: str = NONE,
) -> tuple[Tensor, Tensor]:
    """All flips in the core's one sweep; arguments and results as of `credit_naive`."""

    def levels(e: Tensor) -> Any:
        return e.detach().double().cpu().view(-1, bits).numpy()

    starts = match.segment_starts
    theta = grad.detach().double().cpu().unflatten(2, (-1, bits)).transpose(1, 2).contiguous()
    options: dict[str, Any] = {
        "e_null": None if e_null is None else levels(e_null),
        "unmatched_self": unmatched == "self",
        "segment_starts": None if starts is None else starts.cpu().numpy(),
        "max_length": match.max_length,
        "min_length": match.min_length,
    }
    qs, ks, vs = (symbols.pack(x, bits).cpu().numpy() for x in (q, k, v))
    slope = (theta.numpy(), levels(e0), levels(e1))
    if tied == NONE:
        credits = [*native_bitflip.bitflip_credit(qs, ks, vs, *slope, **options)]
    else:
        options["flip_values"] = tied == STREAM
        credits = [native_bitflip.tied_bitflip_credit(qs, vs, *slope, **options)]
    work = torch.promote_types(grad.dtype, torch.float32)
    found = [
        torch.from_numpy(x).transpose(1, 2).flatten(2).to(device=grad.device, dtype=work)
        for x in credits
    ]
    return found[0], found[1] if tied == NONE else torch.zeros_like(found[0])


def credit_gpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: str,
    tied: str = NONE,
) -> tuple[Tensor, Tensor]:
    """All flips in the GPU kernel's sweep, without a synchronisation; as `credit_naive`."""
    from rosakit.cuda import bitflip as gpu

    qs, ks, vs = (symbols.pack(x, bits) for x in (q, k, v))
    return gpu.bitflip_credit(
        qs,
        ks,
        vs,
        grad.to(torch.promote_types(grad.dtype, torch.float32)),
        e0,
        e1,
        e_null,
        tied=tied != NONE,
        flip_values=tied == STREAM,
        unmatched_self=unmatched == "self",
        segment_starts=match.segment_starts,
        max_length=match.max_length,
        min_length=match.min_length,
    )


def credit(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    *,
    bits: int,
    match: MatchOptions,
    unmatched: str,
    tied: str,
    phase: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Credit of q and k by the cheapest exact way, or sampled where ``stride > 1``.

    A sample of few flips is matched flip by flip. Of many, the one sweep over all flips is cheaper,
    and what was not drawn is left out of it: the same sample, however it is found.
    """
    arguments = (grad, q, k, v, e0, e1, e_null)
    options: dict[str, Any] = {"bits": bits, "match": match, "unmatched": unmatched, "tied": tied}
    phases = (phase, stride - 1 - phase) if stride > 1 else (0,)
    # All routes flip together, so their number does not count.
    flips = -(-q.shape[1] * bits // stride) * len(phases) * (2 if tied == NONE else 1)
    few = stride > 1 and flips * SWEEP_FLIPS < q.shape[1]
    sweep = None if few else _sweep(q, bits, match)
    if sweep is None:
        return credit_naive(*arguments, phases=phases, stride=stride, **options)
    found = sweep(*arguments, **options)
    if stride == 1:
        return found
    warn_once(
        f"rosakit: bitflip(stride={stride}) draws so many flips that they are taken out of a sweep "
        "over all of them; stride=1 costs the same here, and is exact"
    )
    drawn = _weights(q, bits, phases, stride)
    return found[0] * drawn, found[1] * drawn


def _weights(q: Tensor, bits: int, phases: tuple[int, ...], stride: int) -> Tensor:
    """How much each drawn flip counts, 0 for the others: ``[T, C]``."""
    length, channels = q.shape[1:]
    work = torch.promote_types(q.dtype, torch.float32)
    weights = torch.zeros(length * bits, dtype=work, device=q.device)
    for first in phases:  # the two may be one
        weights[first::stride] += stride / len(phases)
    return weights.view(length, bits).repeat(1, channels // bits)


def _sweep(
    q: Tensor, bits: int, match: MatchOptions
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Who does all flips at once for these streams, or None."""
    if match.granularity != "token" or match.backend == "oracle":
        return None
    if q.device.type == "cuda" and match.backend != "cpu" and _on_gpu(q, bits):
        return credit_gpu
    if not native_bitflip.built():
        warn_once("rosakit: bitflip without the compiled core matches every flipped stream again")
        return None
    if q.device.type == "cuda":
        warn_once("rosakit: bitflip runs on the CPU core; the tensors travel there and back")
    return credit_core


def _on_gpu(q: Tensor, bits: int) -> bool:
    """Whether the GPU's sweep takes channels ``[B, T, C]`` of `bits` a route."""
    if not cuda.available() or bits > 8:
        return False
    from rosakit.cuda.bitflip import MAX_POSITIONS

    return q.shape[1] <= MAX_POSITIONS
