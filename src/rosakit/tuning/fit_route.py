"""Training the token route alone, on features of a frozen model (see `route_features`)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.layers import TokenRoute
from rosakit.tuning.attach import controller_of
from rosakit.tuning.route_features import (
    FeatureReader,
    RouteFeatures,
    concatenate,
    label_log_prob,
)

__all__ = ["RouteFit", "fit_features", "fit_token_route", "route_loss"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RouteFit:
    """What the training of a token route did.

    Attributes:
        tokens: predicted tokens of one pass.
        steps: optimizer steps.
        before, after: mean loss over all of them at the start and at the end, nats.
    """

    tokens: int
    steps: int
    before: float
    after: float


def fit_token_route(
    model: Any,
    blocks: Sequence[Mapping[str, Tensor]],
    *,
    steps: int = 300,
    batch_tokens: int = 2048,
    lr: float = 2e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> RouteFit:
    """Train the token route of an attached model, everything else frozen.

    One forward pass over the blocks reads the features; the optimizer then works on them alone.
    The loss is exactly the whole model's cross entropy, and all steps together cost less than a
    few forward passes.

    Args:
        model: attached with a token route (``retrieve=False`` trains the control alike).
        blocks: batches as the model takes them: `input_ids` ``[B, T]`` or ``[T]``, optionally
            `labels` (-100 is not predicted), `position_ids`, `attention_mask`.
        steps: optimizer steps (Adam, cosine schedule to zero after a short warm-up).
        batch_tokens: predicted tokens a step, drawn anew without replacement pass by pass.
        lr: peak learning rate.
        weight_decay: of the hidden state's score, decoupled.
        seed: of the order.
        cache: folder that keeps the features for another run; None to keep nothing.
        progress: called as ``progress(what, done, total)``.

    Raises:
        InvalidInputError: no token route, no blocks, or no labels.
    """
    route = controller_of(model).token_route
    reader = FeatureReader(model, cache)
    assert route is not None
    if not blocks:
        raise InvalidInputError("fit_token_route needs at least one block, got none")
    parts = []
    for done, block in enumerate(blocks, start=1):
        parts.append(reader.read(block))
        if progress is not None:
            progress("reading features", done, len(blocks))
    return fit_features(
        route,
        concatenate(parts),
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        progress=progress,
    )


def fit_features(
    route: TokenRoute,
    features: RouteFeatures,
    *,
    steps: int = 300,
    batch_tokens: int = 2048,
    lr: float = 2e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> RouteFit:
    """Train a token route on given features; see `fit_token_route` for the arguments.

    The route starts from where it is, and its random start is its own: two routes trained with
    one seed see the same batches in the same order.
    """
    total = len(features)
    if total == 0:
        raise InvalidInputError("the blocks hold no labels, so there is nothing to train on")
    if steps < 1 or batch_tokens < 1 or not lr > 0:
        raise InvalidInputError(
            f"steps and batch_tokens must be at least 1 and lr above 0; got {steps}, "
            f"{batch_tokens} and {lr}"
        )
    features = features.to(route.keep_bias.device)
    decayed = [route.hidden_score]
    rest = [p for p in route.parameters() if p is not route.hidden_score]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.99),
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    # Small tensors: on a CPU more threads would mostly wait for each other, and on a busy machine
    # ten times as long.
    with _threads(1 if features.label.device.type == "cpu" else None):
        before = route_loss(route, features)
        _optimize(route, features, optimizer, schedule, steps, batch_tokens, seed, progress)
        return RouteFit(total, steps, before, route_loss(route, features))


def _optimize(
    route: TokenRoute,
    features: RouteFeatures,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
    batch_tokens: int,
    seed: int,
    progress: Progress | None,
) -> None:
    total = len(features)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    size = min(batch_tokens, total)
    for step in range(1, steps + 1):
        if len(order) < size:
            order = torch.randperm(total, generator=generator)
        batch, order = order[:size], order[size:]
        optimizer.zero_grad()
        log_prob = label_log_prob(route, features.pick(batch.to(features.label.device)))
        (-log_prob.mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("training the token route", step, steps)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Give torch this many threads inside the block; None leaves it alone."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def route_loss(route: TokenRoute, features: RouteFeatures, chunk: int = 65536) -> float:
    """Mean negative log likelihood of all labels, nats."""
    total = 0.0
    for start in range(0, len(features), chunk):
        log_prob = label_log_prob(route, features.pick(slice(start, start + chunk)))
        total -= float(log_prob.double().sum())
    return total / len(features)
