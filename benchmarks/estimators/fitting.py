"""(a) Direct fitting: q and k are free tensors, the output has to become a given one.

No trunk, no data: what is left is the estimator. A teacher with symbols of its own reads values
that the student is given; the student starts from other symbols. Every estimator gets the same
starts, the same number of steps of Adam, and the same three learning rates to choose from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.estimators.variants import VARIANTS
from rosakit.ops import rosa

RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Fit:
    """Sizes of the problem.

    Attributes:
        length: T.
        routes, bits: of the streams.
        batch: independent problems in one run.
        steps: steps of Adam.
    """

    length: int = 64
    routes: int = 8
    bits: int = 4
    batch: int = 4
    steps: int = 300


def run(
    variant: str,
    seed: int,
    rate: float,
    *,
    fit: Fit,
    device: str,
    after_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Fit once; the share of output bits that the hard forward gets right, every 10 steps."""
    chosen = VARIANTS[variant]
    draw = torch.Generator().manual_seed(seed)
    channels = fit.routes * fit.bits
    shape = (5, fit.batch, fit.length, channels)
    teacher_q, teacher_k, v, q, k = torch.randn(shape, generator=draw).to(device)
    e1 = torch.ones(channels, device=device)
    with torch.no_grad():
        target = rosa(teacher_q, teacher_k, v, -e1, e1, bits=fit.bits)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    optimiser = torch.optim.Adam(leaves, lr=rate)
    curve = []
    for step in range(fit.steps):
        options = dict(chosen.options)
        options |= {n: s.at(step, fit.steps) for n, s in chosen.schedules.items()}
        y = rosa(*leaves, v, -e1, e1, bits=fit.bits, estimator=chosen.estimator, **options)
        loss = (y - target).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if after_step is not None:
            after_step()
        if step % 10 == 9:
            with torch.no_grad():
                hard = rosa(*leaves, v, -e1, e1, bits=fit.bits)
            curve.append(round((hard == target).float().mean().item(), 4))
    return {
        "variant": variant,
        "seed": seed,
        "rate": rate,
        "accuracy": curve[-1],
        "accuracy_per_10_steps": curve,
    }
