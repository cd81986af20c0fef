"""Perplexity by the distance to the content that repeats: where long-range memory has to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.evaluate.perplexity import as_ids
from rosakit.evaluate.results import DistanceResult, PositionBucket
from rosakit.evaluate.scores import Progress, Scorer, device_of, model_scorer
from rosakit.layers.token_match import best_successors

__all__ = ["measure_distance", "perplexity_by_distance"]


def perplexity_by_distance(
    model: Any,
    documents: Sequence[Sequence[int] | Tensor],
    edges: Sequence[int],
    *,
    min_length: int = 4,
    progress: Progress | None = None,
) -> DistanceResult:
    """Loss of one model by the distance to the latest longest repetition of the context.

    Args:
        model: a causal language model.
        documents: token ids, each scored alone.
        edges: bucket edges in tokens, ascending; further away goes into one more bucket.
        min_length: tokens of the context that have to repeat.
        progress: called after each document.

    Raises:
        InvalidInputError: no documents or bad edges.
    """
    scored = measure_distance(
        model_scorer(model),
        documents,
        edges,
        min_length=min_length,
        device=device_of(model),
        progress=progress,
    )
    return scored["model"]


def measure_distance(
    scorer: Scorer,
    documents: Sequence[Sequence[int] | Tensor],
    edges: Sequence[int],
    *,
    min_length: int = 4,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, DistanceResult]:
    """`perplexity_by_distance` of every variant that a scorer scores."""
    bounds = list(edges)
    if not documents or not bounds or bounds[0] < 1 or bounds != sorted(set(bounds)):
        raise InvalidInputError(
            f"perplexity by distance needs documents and ascending edges from 1 on, got "
            f"{len(documents)} documents and edges {bounds}"
        )
    limits = torch.tensor(bounds)
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(bounds) + 2, dtype=torch.int64)
    for done, document in enumerate(documents, start=1):
        ids = as_ids(document)
        match = best_successors(ids[None], 1, min_length=min_length)
        position = match.position[0, :-1, 0].to(torch.int64)
        distance = torch.arange(len(ids) - 1) - position + 1  # to the end of the repetition
        # Place 0 holds what is new, place b + 1 the distances up to the edge b.
        place = 1 + torch.bucketize(distance, limits, right=True)
        place = torch.where(position >= 0, place, 0)
        counts += torch.bincount(place, minlength=len(counts))
        for name, scores in scorer(ids[None].to(device)).items():
            loss = -scores.log_prob[0].double().cpu()
            total = sums.setdefault(name, torch.zeros(len(counts), dtype=torch.float64))
            total.scatter_add_(0, place, loss)
        if progress is not None:
            progress("by distance", done, len(documents))
    starts = [1, *bounds]
    stops = [*bounds, max(bounds[-1] + 1, *(len(d) for d in documents))]
    return {
        name: DistanceResult(
            tuple(
                PositionBucket(start, stop, int(count), float(nll))
                for start, stop, count, nll in zip(
                    starts, stops, counts[1:], total[1:], strict=True
                )
                if stop > start
            ),
            PositionBucket(0, 0, int(counts[0]), float(total[0])),
            min_length,
        )
        for name, total in sums.items()
    }
