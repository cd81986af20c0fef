"""One run of a recall task: train the trunk with one estimator, then ask it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.estimators.recall_data import IGNORED, Task
from benchmarks.estimators.trunk import Model, Trunk
from benchmarks.estimators.variants import VARIANTS, Variant

HELD_OUT_SEED = 20231208


@dataclass(frozen=True)
class Training:
    """How every variant is trained.

    Attributes:
        steps, batch: optimiser steps, sequences a step.
        rate: peak learning rate of AdamW, after 50 steps of warm-up, cosine to a twentieth.
        address_rate: factor on it for query and key projections.
        held_out: sequences asked at the end.
    """

    steps: int = 500
    batch: int = 32
    rate: float = 3e-3
    address_rate: float = 1.0
    held_out: int = 512


def run(
    variant: str,
    seed: int,
    *,
    task: Task,
    trunk: Trunk,
    training: Training,
    device: str,
    after_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train and ask; all that a table or a plot needs, as plain numbers."""
    chosen = VARIANTS[variant]
    model = build(chosen, seed, task, trunk).to(device)
    optimiser = _optimiser(model, training)
    draw = torch.Generator(device).manual_seed(1_000_003 * (seed + 1))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    kept: list[torch.Tensor] = []
    begin = time.perf_counter()
    for step in range(training.steps):
        _set_options(model, chosen, step, training.steps)
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * _rate(step, training)
        tokens, targets = task.sample(training.batch, draw)
        asked = questions(targets, task.pairs)
        loss = F.cross_entropy(model(tokens, asked), targets.gather(1, asked).flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        kept.append(loss.detach())
        if len(kept) == 50 or step + 1 == training.steps:
            losses.append(torch.stack(kept).mean().item())
            kept.clear()
        if after_step is not None:
            after_step()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "variant": variant,
        "seed": seed,
        "task": dataclasses.asdict(task),
        "tied_start": trunk.tied_start,
        "steps": training.steps,
        "accuracy": accuracy(model, task, training),
        "losses_per_50_steps": [round(x, 4) for x in losses],
        "seconds": round(seconds, 2),
        "peak_bytes": peak,
    }


def build(variant: Variant, seed: int, task: Task, trunk: Trunk) -> Model:
    """The same numbers for every variant of a seed."""
    torch.manual_seed(seed)
    if variant.full_attention:
        trunk = dataclasses.replace(trunk, window=None)
    return Model(
        task.vocabulary,
        trunk,
        estimator=variant.estimator,
        estimator_options=dict(variant.options),
        retrieve=variant.retrieve,
    )


@torch.no_grad()
def accuracy(model: Model, task: Task, training: Training) -> float:
    """Share of right answers on held-out sequences; the forward is hard, as in decoding."""
    device = model.embed.weight.device
    draw = torch.Generator(device).manual_seed(HELD_OUT_SEED)
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    total = 0
    for _ in range(math.ceil(training.held_out / training.batch)):
        tokens, targets = task.sample(training.batch, draw)
        asked = questions(targets, task.pairs)
        right += (model(tokens, asked).argmax(-1) == targets.gather(1, asked).flatten()).sum()
        total += asked.numel()
    return int(right) / total


def questions(targets: Tensor, pairs: int) -> Tensor:
    """Where something is asked, ascending, int64 ``[B, pairs]``.

    Every row asks as often as it has pairs, so no size has to be read back from a GPU.
    """
    marked = (targets != IGNORED).to(torch.uint8)
    return marked.sort(dim=1, descending=True, stable=True)[1][:, :pairs]


def _optimiser(model: Model, training: Training) -> torch.optim.Optimizer:
    addresses, rest = [], []
    for name, parameter in model.named_parameters():
        (addresses if "q_proj" in name or "k_proj" in name else rest).append(parameter)
    groups = [
        {"params": rest, "factor": 1.0},
        {"params": addresses, "factor": training.address_rate},
    ]
    fused = model.embed.weight.is_cuda  # one kernel for all parameters
    return torch.optim.AdamW(
        groups, lr=training.rate, weight_decay=0.01, betas=(0.9, 0.98), fused=fused
    )


def _rate(step: int, training: Training) -> float:
    warm = min(1.0, (step + 1) / 50)
    return training.rate * warm * (0.525 + 0.475 * math.cos(math.pi * step / training.steps))


def _set_options(model: Model, variant: Variant, step: int, steps: int) -> None:
    for adapter in model.adapters():
        for name, schedule in variant.schedules.items():
            adapter.estimator_options[name] = schedule.at(step, steps)
