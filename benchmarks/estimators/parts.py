"""What each part of the comparison runs: its sizes, variants and jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
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
# Flipping every bit takes most of a second a step at 64 pairs and T = 512, and at the larger sizes
# the softened forwards stay at chance for longer than a part may take.
LEFT_OUT = {
    LARGEST: ("bitflip", "bitflip_sampled", "soft_dp", "soft_scan"),
    MIDDLE: ("bitflip", "bitflip_sampled", "soft_dp", "soft_scan", "soft_scan_st", "control"),
    SMALLEST: ("bitflip_sampled",),
}
STEPS = {LARGEST: 500, MIDDLE: 300, SMALLEST: 300}
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
    """(b) Multi-query associative recall over a sweep of sizes; untied starts at the smallest."""
    tiny = Task(pairs=2, length=16, vocabulary=32)
    sweep = (tiny,) if small else (LARGEST, SMALLEST, MIDDLE)
    jobs = []
    for tied, tasks in ((True, sweep[:1]), (False, sweep[1:2] or sweep), (True, sweep[1:])):
        for task in tasks:
            names = [n for n in variants or VARIANTS if n not in LEFT_OUT.get(task, ())]
            if not tied:  # the others have no addresses that could be untied
                names = [n for n in names if VARIANTS[n].retrieve]
            jobs += [
                _recall(n, seed, task, tied, device, small) for seed in range(seeds) for n in names
            ]
    return jobs


def synonyms(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(c) Recall by another surface form: equal symbols have to be learned."""
    task = Task("synonyms", pairs=16, length=128, vocabulary=512)
    if small:
        task = Task("synonyms", pairs=2, length=32, vocabulary=32)
    return [
        _recall(n, seed, task, True, device, small)
        for seed in range(seeds)
        for n in variants or VARIANTS
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


def cost(variants: Sequence[str] | None, seeds: int, device: str, small: bool) -> list[Job]:
    """(e) Time and peak memory; not averaged over seeds, since the numbers do not matter."""
    routes = 2 if small else 512 if device == "cuda" else 32
    lengths = (32,) if small else (1024, 2048, 4096) if device == "cuda" else (256, 512, 1024)
    return [
        (agreement.cost, {"variant": n, "length": length, "routes": routes, "device": device})
        for length in lengths
        for n in variants or ESTIMATORS
    ]


PARTS: dict[str, Part] = {
    "fit": fit,
    "mqar": mqar,
    "synonyms": synonyms,
    "count": count,
    "agree": agree,
    "cost": cost,
}


def _recall(name: str, seed: int, task: Task, tied: bool, device: str, small: bool) -> Job:
    trunk = replace(_TINY if small else Trunk(), tied_start=tied)
    training = _MOMENT if small else Training(steps=STEPS.get(task, 500))
    options: dict[str, Any] = {"task": task, "trunk": trunk, "training": training}
    return recall.run, {"variant": name, "seed": seed, "device": device, **options}
