"""Needle in a haystack: does the model reproduce what was said far back?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.grids import GridCell, GridResult
from rosakit.evaluate.needles import Needle, Question, make_needles
from rosakit.evaluate.results import NiahCell, NiahResult
from rosakit.evaluate.scores import Progress, Scorer, device_of, model_scorer

__all__ = ["measure_niah", "niah", "niah_grid"]


def niah(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    window: int,
    sink_tokens: int = 0,
    samples: int = 2,
    haystack: str | None = None,
    question: Question = "repeat",
    seed: int = 0,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> NiahResult:
    """Needle-in-a-haystack grid of one model.

    An answer counts if greedy decoding would produce it exactly. That is decided in one forward
    pass: greedy decoding reproduces a text if and only if, along that text, each token is the most
    probable one.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        lengths: tokens of the prompts; see `make_needles`, also for the next ones.
        depths: 0 (start of the haystack) to 1 (its end).
        samples: prompts a cell.
        haystack: text to hide needles in; None for neutral short sentences.
        question: how it is asked.
        seed: of everything random.
        window: tokens; needles that neither question nor answer see through it count as beyond
            it. Give full attention the window it is compared with.
        sink_tokens: first tokens that stay visible; a needle among them is not beyond.
        batch_size: prompts of one length a forward pass.
        progress: called after each batch.

    Raises:
        InvalidInputError: see `make_needles`; window below 1.
    """
    needles = make_needles(
        tokenizer,
        lengths,
        depths,
        samples=samples,
        haystack=haystack,
        question=question,
        seed=seed,
    )
    scored = measure_niah(
        model_scorer(model),
        needles,
        window=window,
        sink_tokens=sink_tokens,
        question=question,
        seed=seed,
        device=device_of(model),
        batch_size=batch_size,
        progress=progress,
    )
    return scored["model"]


def measure_niah(
    scorer: Scorer,
    needles: Sequence[Needle],
    *,
    window: int,
    sink_tokens: int = 0,
    question: Question = "repeat",
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, NiahResult]:
    """`niah` of every variant that a scorer scores, on given needles."""
    if window < 1 or batch_size < 1 or not needles:
        raise InvalidInputError(
            f"niah needs window >= 1, batch_size >= 1 and at least one needle; got {window}, "
            f"{batch_size} and {len(needles)}"
        )
    hits: dict[str, dict[int, bool]] = {}
    done = 0
    for batch in _batches(needles, batch_size):
        ids = torch.stack([needles[index].ids for index in batch])
        answers = [len(needles[index].ids) - needles[index].answer for index in batch]
        for name, scores in scorer(ids.to(device), keep=max(answers)).items():
            for row, index in enumerate(batch):
                right = scores.greedy[row, -answers[row] :].all()
                hits.setdefault(name, {})[index] = bool(right)
        done += len(batch)
        if progress is not None:
            progress("needles", done, len(needles))
    return {
        name: NiahResult(
            _cells(needles, found, window, sink_tokens), window, question, seed, sink_tokens
        )
        for name, found in hits.items()
    }


def niah_grid(result: NiahResult) -> GridResult:
    """A needle grid in the form that all other recall tasks have."""
    cells = tuple(
        GridCell(
            {"length": c.length, "depth": c.depth}, c.samples, c.correct, c.beyond, c.beyond_correct
        )
        for c in result.cells
    )
    return GridResult(("length", "depth"), cells, result.window, result.sink_tokens, result.seed)


def _batches(needles: Sequence[Needle], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for index, needle in enumerate(needles):
        by_length.setdefault(len(needle.ids), []).append(index)
    for members in by_length.values():
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _cells(
    needles: Sequence[Needle], hits: dict[int, bool], window: int, sink_tokens: int
) -> tuple[NiahCell, ...]:
    counts: dict[tuple[int, float], list[int]] = {}
    for index, needle in enumerate(needles):
        cell = counts.setdefault((needle.length, needle.depth), [0, 0, 0, 0])
        hit, beyond = hits[index], needle.beyond(window, sink_tokens)
        for place, value in enumerate((True, hit, beyond, hit and beyond)):
            cell[place] += value
    return tuple(NiahCell(*where, *cell) for where, cell in counts.items())
