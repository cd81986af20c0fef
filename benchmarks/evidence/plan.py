"""The runs of the evidence in the order of their importance, shared among processes by claims."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.claims import unclaimed

__all__ = ["PLAN", "Planned", "claimed"]

TOKENS = 1_000_000
"""Training tokens of every run that is compared."""


class Planned(NamedTuple):
    """One run: arm, seed, window in tokens, training tokens."""

    arm: str
    seed: int
    window: int = 512
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-w{self.window}-t{self.tokens}-s{self.seed}"


_UNTRAINED = ("window+sinks", "full", "recall-untrained", "window")
_MAIN = ("control", "full+trained", "rosa", "recall", "route")
_CONTROLS = ("recall-random", "route-near", "route-random", "route-own")
_SWEEP = ("rosa+repeat", "rosa-span8", "rosa-K4", "rosa-K32", "rosa-half", "rosa-rank4")
_BITS = ("adapters-own", "adapters")

PLAN = (
    *(Planned(arm, 0) for arm in _MAIN),
    *(Planned(arm, 0) for arm in _UNTRAINED),
    *(Planned(arm, seed) for seed in (1, 2) for arm in _MAIN),
    *(Planned(arm, seed) for seed in (0, 1, 2) for arm in _CONTROLS),
    *(Planned("full+route", seed) for seed in (0, 1, 2)),
    *(Planned(arm, 0) for arm in _BITS),
    # More tokens, another window, other settings: one seed each.
    *(Planned(arm, 0, 512, 4 * TOKENS) for arm in ("control", "full+trained", "rosa")),
    *(Planned(arm, 0) for arm in _SWEEP),
    *(Planned(arm, 0, 256) for arm in ("control", "full+trained", "rosa", "route", "window+sinks")),
    *(Planned(arm, seed) for seed in (1, 2) for arm in _BITS),
)


def claimed(plan: Sequence[Planned], folder: Path, deadline: float) -> Iterator[Planned]:
    """Runs that this process is the first to claim, as long as they would end in time.

    What a run takes is judged by what this process's earlier ones took for each token.

    Args:
        plan: runs, the most important first.
        folder: of results and claims.
        deadline: on `time.monotonic`.
    """
    slowest = fixed = 0.0

    def expected(run: Planned) -> float:
        return slowest * run.tokens + fixed

    for run in unclaimed(plan, folder, deadline, expected):
        began = time.monotonic()
        yield run
        took = time.monotonic() - began
        if run.arm in _UNTRAINED:
            fixed = max(fixed, took)
        else:
            slowest = max(slowest, took / run.tokens)
