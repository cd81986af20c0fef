"""(e) The direction of every estimator against the exact single-bit differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.estimators.variants import VARIANTS, Variant
from rosakit.ops import rosa

STREAMS = ("random", "copies")


def run(variant: str, stream: str, seed: int, *, length: int, device: str) -> dict[str, Any]:
    """Cosine of dq, dk and dv with those of `bitflip`, for random slopes of the loss.

    ``copies``: keys equal queries but for a tenth of the bits, and the second half of the stream
    repeats the first, so that matches are long; ``random``: everything is independent.
    """
    inputs = example(stream, seed, length, 32, device)
    draw = torch.Generator().manual_seed(seed + 1)
    slope = torch.randn(inputs[0].shape, generator=draw).to(device)
    exact = gradients(inputs, slope, Variant("bitflip"))
    torch.manual_seed(seed)
    got = gradients(inputs, slope, VARIANTS[variant])
    row: dict[str, Any] = {"variant": variant, "stream": stream, "seed": seed, "length": length}
    for name, a, b in zip(("q", "k", "v"), got, exact, strict=True):
        row[f"cosine_{name}"] = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    return row


def example(
    stream: str, seed: int, length: int, channels: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``[1, T, C]``."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, length, channels, generator=draw)
    if stream == "copies":
        q[:, length // 2 :] = q[:, : length - length // 2].clone()
        same = torch.rand(q.shape, generator=draw) < 0.9
        k = torch.where(same, q, k)
    return q.to(device), k.to(device), v.to(device)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor], slope: Tensor, variant: Variant
) -> tuple[Tensor, ...]:
    """dq, dk, dv of ``<slope, y>``, with schedules at their middle."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    options = variant.options | {n: s.at(1, 2) for n, s in variant.schedules.items()}
    e1 = torch.ones(leaves[0].shape[-1], device=slope.device)
    y = rosa(*leaves, -e1, e1, bits=4, estimator=variant.estimator, **options)
    found = torch.autograd.grad(y, leaves, slope, allow_unused=True)
    return tuple(
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
    )
