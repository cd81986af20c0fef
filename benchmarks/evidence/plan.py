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
_NEEDLES = ("rosa+hide50", "rosa+hide100", "rosa+repeat", "rosa+hide50+repeat")
_BITS = ("adapters-own", "adapters", "adapters-token", "route+adapters")
_ALONE = ("adapters-own-alone", "adapters-token-alone", "route-only", "route+own")
_LEARNED = ("adapters-suffix", "adapters-bit1", "adapters-bit8", "adapters-untied",
            "adapters-shared", "adapters-soft", "adapters-routes16")  # fmt: skip
_TOKEN = ("adapters-token-bit1", "adapters-token-bit8", "adapters-token-all", "rosa+adapters")
_ROUTE = ("route-K1", "route-K4", "route+repeat")
_SPANS = ("rosa-span8", "rosa-K4", "rosa-K32", "rosa-half", "rosa-rank4", "rosa-rank64",
          "rosa+hide25")  # fmt: skip
_BUDGET = ("control", "full+trained", "rosa")


def _each(arms: Sequence[str], seeds: Sequence[int] = (0,), **size: int) -> list[Planned]:
    return [Planned(arm, seed, **size) for seed in seeds for arm in arms]


PLAN = (
    # One long run first: begun late, it would not end. The others of its budget come below.
    *_each(_BUDGET, tokens=4 * TOKENS),
    *_each(_MAIN),
    *_each(_UNTRAINED),
    *_each(_NEEDLES),
    *_each(_MAIN, (1, 2)),
    *_each(_NEEDLES, (1, 2)),
    *_each(_BITS, (0, 1, 2)),
    *_each(_UNTRAINED, window=256),
    *_each(_MAIN, (0, 1, 2), window=256),
    *_each(_CONTROLS, (0, 1, 2)),
    *_each(_ALONE),
    *_each(_LEARNED),
    *_each(_TOKEN),
    *_each(_ROUTE),
    *_each(_SPANS),
    *_each(_BUDGET, tokens=TOKENS // 2),
    *_each(_BUDGET, tokens=2 * TOKENS),
    *_each(("full+route",)),
    # Seeds of the sweeps, as far as the time goes.
    *_each((*_ROUTE, *_SPANS, *_ALONE), (1, 2)),
    *_each((*_TOKEN, *_LEARNED), (1, 2)),
    *_each(_BUDGET, (1, 2), tokens=TOKENS // 2),
    *_each(_BUDGET, (1, 2), tokens=2 * TOKENS),
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
