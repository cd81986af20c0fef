"""The arms: what each sees, what it trains, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.evidence.view import View

__all__ = ["ARMS", "Arm", "arms"]


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        what: in words, for tables.
        view: who sees whom.
        rank: of LoRA on all linear layers; 0 for none.
        route: candidates of the token route; 0 for none.
        candidates: where the route's candidates come from: "match"; "own", the current token in
            every place (nothing retrieved, all parameters kept); "random", tokens from places that
            mean nothing; "near", matches inside the window only.
        adapters: layers with adapters of bit routes beside LoRA, which also get their own value.
        retrieve: whether those retrieve; False is their control.
        repeat: passages copied far ahead in half of the training sequences, each.
    """

    what: str
    view: View
    rank: int = 16
    route: int = 0
    candidates: Literal["match", "own", "random", "near"] = "match"
    adapters: tuple[int, ...] = ()
    retrieve: bool = True
    repeat: int = 0

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.rank or self.route or self.adapters)


def arms(window: int) -> dict[str, Arm]:
    """All arms at one window, by name."""
    sinks = View(window)
    recall = replace(sinks, recall=16, before=32, after=32)
    bits = Arm("LoRA and bit routes with own value", sinks, adapters=(3, 9, 15, 21, 27))
    route = Arm("LoRA and token route", sinks, route=16)
    both = Arm("LoRA, token route and recalled spans", recall, route=16)
    return {
        "full": Arm("full attention, untrained", View(None), rank=0),
        "window": Arm("window without sinks, untrained", replace(sinks, sinks=0), rank=0),
        "window+sinks": Arm("window and sinks, untrained", sinks, rank=0),
        "recall-untrained": Arm("recalled spans, untrained, no parameters", recall, rank=0),
        "full+trained": Arm("LoRA, full attention: the ceiling", View(None)),
        "full+route": Arm("LoRA and token route, full attention", View(None), route=16),
        "control": Arm("LoRA, nothing retrieved", sinks),
        "route-own": replace(route, what="LoRA and token route, own token", candidates="own"),
        "route-random": replace(route, what="LoRA and token route, random", candidates="random"),
        "route-near": replace(route, what="LoRA and token route, window only", candidates="near"),
        "route": route,
        "recall-random": Arm("LoRA and spans at random", replace(recall, address="random")),
        "recall": Arm("LoRA and recalled spans", recall),
        "rosa": both,
        "rosa+repeat": replace(both, what=f"{both.what}, repeated passages", repeat=2),
        "rosa-span8": replace(both, what="the same, spans of 16", view=replace(sinks, recall=16)),
        "rosa-K4": replace(both, what="the same, 4 spans", view=replace(recall, recall=4)),
        "rosa-K32": replace(
            both,
            what="the same, 32 spans of 32",
            view=replace(sinks, recall=32, before=16, after=16),
        ),
        "rosa-half": replace(
            both,
            what="the same, every other layer",
            view=replace(recall, layers=tuple(range(0, 64, 2))),
        ),
        "rosa-rank4": replace(both, what="the same, LoRA of rank 4", rank=4),
        "adapters-own": replace(bits, what="LoRA and own value, same parameters", retrieve=False),
        "adapters": bits,
    }


ARMS = tuple(arms(256))
"""Names of all arms."""
