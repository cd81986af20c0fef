"""Detectors of what goes wrong while addresses train, each with a remedy.

Loss and match rate can look healthy while retrieval means nothing. These detectors look at one
layer's symbols, matches and levels; `rosakit.tuning.health` has the numbers to plot.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.types import Match


class Thresholds(NamedTuple):
    """Where a detector speaks up.

    Attributes:
        collapsed: a route's most frequent symbol has more than this share of the positions.
        dead: a route matches at less than this share of the positions.
        agreement: share of equal bits of q and k at the same position; chance is 0.5 and a tied
            start has 1.
        levels: mean ``|e1 - e0|``; it starts at 2.
        routes: a fault of single routes is reported when it has more than this share of them.
    """

    collapsed: float = 0.95
    dead: float = 0.01
    agreement: float = 0.6
    levels: float = 1e-3
    routes: float = 0.1


class Fault(NamedTuple):
    """What was found.

    Attributes:
        name: "collapsed_q", "collapsed_k", "dead", "drifting" or "vanishing".
        value: share of routes, share of equal bits, or mean ``|e1 - e0|``.
        message: what is wrong, what was expected, and how to mend it.
    """

    name: str
    value: float
    message: str


def find_faults(
    q: Tensor | None,
    k: Tensor | None,
    match: Match,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    segment_starts: Tensor | None = None,
    thresholds: Thresholds | None = None,
) -> list[Fault]:
    """The faults of one layer's retrieval on one batch.

    Args:
        q, k: ``[B, T, C]``, real-valued, as they entered `rosa`; None for addresses that nothing
            trains.
        match: what it read, ``[B, R, T]``.
        e0, e1: ``[C]``.
        bits: bits per route.
        segment_starts: int32 ``[B, T]`` or None; padding is not counted.
        thresholds: where a detector speaks up; None: the defaults.

    Returns:
        The faults, worst kind first; empty for a healthy layer (or a batch of padding).
    """
    at = thresholds or Thresholds()
    batch, _, length = match.position.shape
    real = torch.ones((batch, length), dtype=torch.bool, device=match.position.device)
    if segment_starts is not None:
        real = segment_starts.to(real.device) >= 0
    count = int(real.sum())
    if not count:
        return []
    faults = []
    step = float((e1 - e0).detach().abs().float().mean())
    if step < at.levels:
        faults.append(
            Fault(
                "vanishing",
                step,
                f"mean |e1 - e0| is {step:.2g}, expected at least {at.levels:g}: retrieved bits no "
                "longer change the output, and q, k and v get no gradient; exclude e0 and e1 from "
                "weight decay, or start them again at -1 and 1",
            )
        )
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        share = _collapsed(x, real, bits, at.collapsed)
        if share > at.routes:
            faults.append(
                Fault(
                    f"collapsed_{name}",
                    share,
                    f"{share:.0%} of the routes of {name} emit one symbol at more than "
                    f"{at.collapsed:.0%} of the positions, so their matches carry no address; "
                    f"lower the learning rate of {name}_proj (1/30 of the rest is a start), or use "
                    "address='token'",
                )
            )
    rate = ((match.position >= 0) & real[:, None]).sum((0, 2)) / count
    dead = int((rate < at.dead).sum()) / len(rate)
    if dead > at.routes:
        faults.append(
            Fault(
                "dead",
                dead,
                f"{dead:.0%} of the routes match at fewer than {at.dead:.0%} of the positions; "
                "use fewer bits a route, a smaller min_length, shorter length_tiers or "
                "hash_orders, or a tied start of q and k",
            )
        )
    if q is None or k is None:
        return faults
    agreement = float(((q > 0) == (k > 0))[real].float().mean())
    if agreement < at.agreement:
        faults.append(
            Fault(
                "drifting",
                agreement,
                f"q and k agree in {agreement:.0%} of their bits at the same position (chance is "
                "50%), so a passage no longer finds its own repetition; share one projection for q "
                "and k, start them tied, or lower their learning rate",
            )
        )
    return faults


class FaultLog:
    """Warns of each kind of fault once a run, naming the layers, and counts them for a plot."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def take(self, faults: Mapping[str, Sequence[Fault]]) -> dict[str, float]:
        """Take in what a step found.

        Args:
            faults: the faults of each layer that was looked at, by the layer's name.

        Returns:
            `faults`, the share of layers with any, and ``fault_<kind>`` for each kind found:
            the share of the layers that have it.
        """
        if not faults:
            return {}
        by_kind: dict[str, dict[str, Fault]] = {}
        for place, found in faults.items():
            for fault in found:
                by_kind.setdefault(fault.name, {})[place] = fault
        for kind, places in by_kind.items():
            new = [place for place in places if (place, kind) not in self._seen]
            if new:
                self._seen.update((place, kind) for place in new)
                others = f" (and {', '.join(new[1:])})" if len(new) > 1 else ""
                warnings.warn(
                    f"rosakit: {new[0]}{others}: {places[new[0]].message}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        out = {f"fault_{kind}": len(places) / len(faults) for kind, places in by_kind.items()}
        return {"faults": sum(bool(found) for found in faults.values()) / len(faults)} | out


def _collapsed(x: Tensor, real: Tensor, bits: int, limit: float) -> float:
    """Share of routes whose most frequent symbol has more than `limit` of the positions."""
    packed = symbols.pack(x, bits).to(torch.int64).transpose(0, 1).flatten(1)[:, real.flatten()]
    routes = packed.shape[0]
    first = torch.arange(routes, device=x.device)[:, None] << bits
    counts = torch.bincount((packed + first).flatten(), minlength=routes << bits)
    top = counts.view(routes, -1).max(1).values / packed.shape[1]
    return int((top > limit).sum()) / routes
