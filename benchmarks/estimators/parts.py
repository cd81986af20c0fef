"""What each part of the comparison runs: its sizes, variants and jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.estimators import agreement, counting, fitting, recall
from benchmarks.estimators.pool import Job
from benchmarks.estimators.recall import Training
from benchmarks.estimators.recall_data import Task
from benchmarks.estimators.trunk import Trunk
from benchmarks.estimators.variants import VARIANTS

Part = Callable[[Sequence[str] | None, int, str, bool], list[Job]]
"""``part(variants, seeds, device, small) -> jobs``; `small` is seconds on a CPU."""

ESTIMATORS = [n for n, v in VARIANTS.items() if v.retrieve and n != "frozen"]
LARGEST = Task(pairs=64, length=512)
MIDDLE = Task(pairs=64, length=256, vocabulary=2048)
SMALLEST = Task(pairs=16, length=128, vocabulary=512)


@dataclass(frozen=True)
class Point:
    """One size of MQAR: who is trained on it, for how many steps, from which start."""

    task: Task
    steps: int
    variants: tuple[str, ...]
    tied_start: bool = True


_RETRIEVING = tuple(n for n, v in VARIANTS.items() if v.retrieve)
_FEW = ("counterfactual", "soft_dp_st", "suffix_attention", "frozen", "control")
_FILLED = replace(LARGEST, random_filler=True)
POINTS = (
    Point(LARGEST, 500, tuple(VARIANTS)),
    Point(_FILLED, 1000, _FEW),
    Point(_FILLED, 1000, ("counterfactual", "suffix_attention"), tied_start=False),
    Point(SMALLEST, 300, _RETRIEVING, tied_start=False),
    Point(SMALLEST, 300, tuple(VARIANTS)),
    Point(MIDDLE, 300, _FEW),
    # One size at a time around the largest.
    *(Point(replace(LARGEST, pairs=n), 500, _FEW) for n in (128, 32, 16)),
    *(Point(replace(LARGEST, length=n), 500, _FEW) for n in (1024, 256)),
    *(Point(replace(LARGEST, vocabulary=n), 500, _FEW) for n in (2048, 512)),
)
SYNONYMS = Task("synonyms", pairs=16, length=128, vocabulary=512, random_filler=True)
_TINY = Trunk(width=16, layers=1, heads=2, bits=4, routes=4)
_MOMENT = Training(steps=4, batch=4, held_out=4)


def fit(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(a) Direct fitting of symbols."""
    size = fitting.Fit(length=16, routes=2, batch=2, steps=20) if small else fitting.Fit()
    rates = fitting.RATES[:1] if small else fitting.RATES
    return [
        (fitting.run, {"variant": n, "seed": s, "rate": r, "fit": size, "device": device})
        for s in range(seeds)
        for n in variants or ESTIMATORS
        for r in rates
    ]


def mqar(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(b) Multi-query associative recall: the points of `POINTS`, in their order."""
    points = POINTS
    if small:
        tiny = Task(pairs=2, length=16, vocabulary=32)
        points = (Point(tiny, 4, tuple(VARIANTS)), Point(tiny, 4, _RETRIEVING, tied_start=False))
    return [
        _recall(name, seed, point.task, point.steps, point.tied_start, device, small)
        for point in points
        for seed in range(seeds)
        for name in point.variants
        if name in (variants or point.variants)
    ]


def synonyms(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(c) Recall by another surface form: equal symbols have to be learned."""
    task = Task("synonyms", pairs=2, length=32, vocabulary=32) if small else SYNONYMS
    return [
        _recall(name, seed, task, 1000, True, device, small)
        for seed in range(seeds)
        for name in variants or VARIANTS
    ]


def count(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(d) RWKV-8's counting demo."""
    names = variants or [n for n in VARIANTS if n != "attention"]
    size = {"steps": 3, "batch": 2} if small else {"steps": 1000, "batch": 128}
    return [
        (counting.run, {"variant": n, "seed": s, "device": device, **size})
        for s in range(seeds)
        for n in names
    ]


def agree(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(e) Cosine with the exact single-bit differences."""
    return [
        (
            agreement.run,
            {"variant": n, "stream": stream, "seed": s, "length": length, "device": device},
        )
        for s in range(seeds)
        for stream in agreement.STREAMS
        for length in ((24,) if small else (64, 512))
        for n in variants or ESTIMATORS
    ]


PARTS: dict[str, Part] = {
    "fit": fit,
    "mqar": mqar,
    "synonyms": synonyms,
    "count": count,
    "agree": agree,
}


def _recall(
    name: str, seed: int, task: Task, steps: int, tied: bool, device: str, small: bool
) -> Job:
    trunk = replace(_TINY if small else Trunk(), tied_start=tied)
    training = _MOMENT if small else Training(steps=steps)
    options: dict[str, Any] = {"task": task, "trunk": trunk, "training": training}
    return recall.run, {"variant": name, "seed": seed, "device": device, **options}
