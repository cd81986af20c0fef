"""Sweeps: one choice varied at a time, beside references trained alike.

Each group is one question; its reference stands in it, or among the first group's. The plan asks
the questions in the order of their importance, one seed of all before the second of any, and longer
trainings after that, so that whatever has finished when the time is over can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.evidence.plan import TOKENS, Planned

__all__ = ["GROUPS", "LONG", "SWEEP", "Group"]


class Group(NamedTuple):
    """One question of the sweeps: its title, its arms, the window and the training in tokens."""

    title: str
    arms: tuple[str, ...]
    window: int = 512
    tokens: int = TOKENS

    def finished(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """What the summary holds of the arms, by name, in the plan's order.

        Names tell another budget than the usual one, which is the summary's if the plan was scaled.
        """
        known = summary["windows"].get(str(self.window), {"arms": {}})["arms"]
        tokens = self.tokens * summary["sizes"]["tokens"] // TOKENS
        budget = "" if self.tokens == TOKENS else f"@{tokens / 1e6:g}M"
        return {arm + budget: known[arm + budget] for arm in self.arms if arm + budget in known}


_BUDGET = ("control", "full+trained", "rosa")

GROUPS = (
    Group("references", (*_BUDGET, "route")),
    Group("spans", ("rosa-span8", "rosa-K4", "rosa-K32", "rosa-half")),
    Group("spans hidden in training", ("rosa+hide25", "rosa+hide50")),
    Group("candidates of the token route", ("route-K1", "route-K4", "route+repeat")),
    Group("window 256", ("control", "full+trained", "rosa", "rosa+hide50"), 256),
    Group("bit routes", ("adapters-own", "adapters", "adapters-token")),
    Group(
        "estimators, 16 routes",
        ("adapters-own-routes16", "adapters-routes16", "adapters-suffix", "adapters-soft-scan",
         "adapters-soft-dp", "adapters-bitflip"),
    ),
    Group("queries and keys", ("adapters-untied", "adapters-shared")),
    Group("bits a route", ("adapters-bit1", "adapters-bit8", "adapters-token-bit1",
                           "adapters-token-bit8")),
    Group("layers with adapters", ("adapters-own-all", "adapters-token-all")),
    Group("LoRA of rank 4", ("control@rank4", "full+trained@rank4", "rosa@rank4")),
    Group("LoRA of rank 64", ("control@rank64", "full+trained@rank64", "rosa@rank64")),
    Group("without LoRA", ("adapters-own-alone", "adapters-token-alone", "route-only",
                           "route+own")),
    Group("added to what already sees far", ("full+route-own", "full+route", "rosa+adapters")),
    Group("controls at window 256", ("recall-random", "route-near", "adapters-own",
                                     "adapters-token", "rosa+hide100"), 256),
    Group("2M tokens", _BUDGET, tokens=2 * TOKENS),
    Group("4M tokens", _BUDGET, tokens=4 * TOKENS),
)  # fmt: skip


def _plan(millions: int, seeds: tuple[int, ...]) -> tuple[Planned, ...]:
    groups = [g for g in GROUPS if g.tokens == millions * TOKENS]
    return tuple(
        Planned(arm, seed, g.window, g.tokens) for seed in seeds for g in groups for arm in g.arms
    )


SWEEP = (*_plan(1, (0, 1, 2)), *_plan(2, (0, 1, 2)))

LONG = _plan(4, (0, 1, 2))
"""The longest budget: apart, to be begun first. Begun late, these runs would not end in time."""
