"""Measuring several variants of one model on the same documents and needles."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosakit.evaluate.needles import Needle, Question
from rosakit.evaluate.niah import measure_niah
from rosakit.evaluate.perplexity import measure_perplexity
from rosakit.evaluate.results import NiahResult, PerplexityResult
from rosakit.evaluate.routes import route_scorer
from rosakit.evaluate.scores import Progress, Scorer, device_of, model_scorer
from rosakit.layers import TokenRoute
from rosakit.tuning import RosaConfig, attach, detach
from rosakit.tuning.attach import controller_of

__all__ = ["Measurement", "Task", "measure", "measure_routes", "measure_whole", "route_of"]


@dataclass(frozen=True)
class Task:
    """What every variant is measured on.

    Attributes:
        documents: token ids by name of the text kind ("code", "prose", …); the first is the one
            that tables and plots show.
        needles: prompts, or none.
        window, sink_tokens: what they do not show counts as far away, for all variants.
        edges: of the position buckets, see `rosakit.evaluate.perplexity`.
        question, seed: of the needles.
        batch_size: sequences a forward pass.
    """

    documents: Mapping[str, Sequence[Tensor]]
    needles: Sequence[Needle]
    window: int
    edges: Sequence[int] | None = None
    sink_tokens: int = 0
    question: Question = "repeat"
    seed: int = 0
    batch_size: int = 1


@dataclass(frozen=True)
class Measurement:
    """Perplexity by kind of text, and the needle grid."""

    perplexity: dict[str, PerplexityResult]
    niah: NiahResult | None


def measure(
    scorer: Scorer,
    task: Task,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Run a task with a scorer: a measurement of each of its variants."""
    found: dict[str, dict[str, PerplexityResult]] = {}
    for kind, documents in task.documents.items():
        scored = measure_perplexity(
            scorer,
            documents,
            device=device,
            edges=task.edges,
            batch_size=task.batch_size,
            progress=_named(progress, f"held-out {kind}"),
        )
        for name, result in scored.items():
            found.setdefault(name, {})[kind] = result
    grids: dict[str, NiahResult] = {}
    if task.needles:
        grids = measure_niah(
            scorer,
            task.needles,
            window=task.window,
            sink_tokens=task.sink_tokens,
            question=task.question,
            seed=task.seed,
            device=device,
            batch_size=task.batch_size,
            progress=progress,
        )
    return {name: Measurement(result, grids.get(name)) for name, result in found.items()}


def measure_routes(
    model: Any,
    attached: RosaConfig,
    routes: Mapping[str, TokenRoute | None],
    task: Task,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Measure variants that share a frozen base and its window: one forward pass for all of them.

    Args:
        model: a plain model; it is attached for the measurement and detached again.
        attached: the window; adapters are left out, and the token route serves all variants.
        routes: by variant; None for the base without a route.
        task: what to measure.
        cache: folder that keeps what the base computed; None to keep nothing.
        progress: called after each batch.
    """
    attach(model, attached)
    try:
        scorer = route_scorer(model, routes, cache=cache)
        return measure(scorer, task, device=device_of(model), progress=progress)
    finally:
        detach(model)


def measure_whole(
    model: Any, name: str, task: Task, *, progress: Progress | None = None
) -> dict[str, Measurement]:
    """Measure one variant through the whole model, whatever is attached to it."""
    scorer = model_scorer(model, name)
    return measure(scorer, task, device=device_of(model), progress=progress)


def route_of(model: Any) -> TokenRoute:
    """A copy of an attached model's token route, independent of the model."""
    route = controller_of(model).token_route
    assert route is not None
    return copy.deepcopy(route)


def _named(progress: Progress | None, what: str) -> Progress | None:
    if progress is None:
        return None
    return lambda _, done, total: progress(what, done, total)
