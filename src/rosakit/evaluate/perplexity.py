"""Perplexity by position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.evaluate.results import PerplexityResult, PositionBucket
from rosakit.evaluate.scores import Progress, Scorer, device_of, model_scorer

__all__ = ["measure_perplexity", "perplexity", "position_edges"]


def position_edges(longest: int, first: int = 256) -> tuple[int, ...]:
    """Bucket edges ``0, first, 2 first, 4 first, …, longest``.

    With ``first`` equal to the window, the tokens of the first bucket have seen everything that
    precedes them, whatever the window hides from later ones.
    """
    edges, edge = [0], first
    while edge < longest:
        edges.append(edge)
        edge *= 2
    return (*edges, longest)


def perplexity(
    model: Any,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    edges: Sequence[int] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of documents by position, every predicted token weighing the same.

    Args:
        model: a causal language model (`.logits` are logits or log probabilities).
        documents: token ids, each scored alone from its first token; the first token of a document
            is context and is not predicted.
        edges: bucket edges in tokens, ascending from 0; positions past the last edge go into one
            more bucket. A token's position is the number of tokens before it. Default:
            `position_edges` of the longest document.
        batch_size: documents a forward pass.
        progress: called after each batch.

    Raises:
        InvalidInputError: no documents, a document of less than two tokens, bad edges.
        InvalidTypeError: documents that are not integers.
    """
    scored = measure_perplexity(
        model_scorer(model),
        documents,
        device=device_of(model),
        edges=edges,
        batch_size=batch_size,
        progress=progress,
    )
    return scored["model"]


def measure_perplexity(
    scorer: Scorer,
    documents: Sequence[Sequence[int] | Tensor],
    *,
    device: torch.device | str = "cpu",
    edges: Sequence[int] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, PerplexityResult]:
    """`perplexity` of every variant that a scorer scores; the other arguments are its."""
    rows = [as_ids(document) for document in documents]
    if not rows:
        raise InvalidInputError("perplexity needs at least one document, got none")
    longest = max(len(row) for row in rows)
    bounds = torch.tensor(_checked_edges(edges, longest))
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(bounds) - 1, dtype=torch.int64)
    done = 0
    for batch in _batches(rows, batch_size):
        ids, mask = pad_right(batch)
        target = torch.arange(1, ids.shape[1])  # number of tokens before each predicted token
        bucket = (torch.bucketize(target, bounds, right=True) - 1).expand(len(batch), -1)
        real = torch.ones_like(bucket, dtype=torch.bool) if mask is None else mask[:, 1:]
        scored = scorer(ids.to(device), None if mask is None else mask.to(device))
        counts += torch.bincount(bucket[real], minlength=len(counts))
        for name, scores in scored.items():
            # float64 sums: the result does not depend on the batch size beyond the model's own.
            nll = -scores.log_prob.double().cpu()[real]
            total = sums.setdefault(name, torch.zeros(len(counts), dtype=torch.float64))
            total.index_add_(0, bucket[real], nll)
        done += len(batch)
        if progress is not None:
            progress("perplexity", done, len(rows))
    pairs = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    return {
        name: PerplexityResult(
            tuple(
                PositionBucket(start, stop, tokens, nll)
                for (start, stop), tokens, nll in zip(
                    pairs, counts.tolist(), total.tolist(), strict=True
                )
            ),
            len(rows),
        )
        for name, total in sums.items()
    }


def as_ids(document: Sequence[int] | Tensor) -> Tensor:
    """Token ids as int64 ``[T]``, checked."""
    ids = document if isinstance(document, Tensor) else torch.tensor(document)
    if ids.dim() == 1 and len(ids) < 2:
        raise InvalidInputError(f"a document of {len(ids)} tokens has nothing to predict; drop it")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidTypeError(f"a document must be integer token ids, got {ids.dtype}")
    if ids.dim() != 1:
        raise InvalidInputError(f"a document must have shape [T], got {list(ids.shape)}")
    return ids.to("cpu", torch.int64)


def pad_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """``ids [B, T]`` and a bool mask, None where nothing is padded."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    if int(lengths.min()) == ids.shape[1]:
        return ids, None
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def _batches(rows: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    if size < 1:
        raise InvalidInputError(f"batch_size must be at least 1, got {size}")
    # Neighbours in length share a batch, so that little is spent on padding.
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _checked_edges(edges: Sequence[int] | None, longest: int) -> list[int]:
    bounds = list(position_edges(longest) if edges is None else edges)
    if len(bounds) < 1 or bounds[0] != 0 or any(b <= a for a, b in itertools.pairwise(bounds)):
        raise InvalidInputError(f"bucket edges must ascend from 0, got {bounds}")
    if bounds[-1] < longest:
        bounds.append(longest)
    return bounds
