"""The arms: what each sees, what it trains, and what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

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
        hide: share of the training batches in which no span is recalled, so that the route's gate
            learns when to trust what the model itself cannot see.
        options: of the adapters' `RosaConfig`, which start from own value and nothing else.
    """

    what: str
    view: View
    rank: int = 16
    route: int = 0
    candidates: Literal["match", "own", "random", "near"] = "match"
    adapters: tuple[int, ...] = ()
    retrieve: bool = True
    repeat: int = 0
    hide: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.rank or self.route or self.adapters)


def arms(window: int) -> dict[str, Arm]:
    """All arms at one window, by name."""
    sinks = View(window)
    recall = replace(sinks, recall=16, before=32, after=32)
    bits = Arm("LoRA and bit routes with own value", sinks, adapters=(3, 9, 15, 21, 27))
    token = replace(
        bits, what="LoRA and bit routes at token matches, near and far, by length",
        options=(("address", "token"), ("far_distance", window), ("length_tiers", (1, 2, 4, 8))),
    )  # fmt: skip

    def learned(what: str, **options: Any) -> Arm:
        return replace(bits, what=f"LoRA, learned bit routes: {what}", options=(*options.items(),))

    route = Arm("LoRA and token route", sinks, route=16)
    route_own = replace(route, what="LoRA and token route, own token", candidates="own")
    both = Arm("LoRA, token route and recalled spans", recall, route=16)
    every = tuple(range(64))  # those that the model has
    ceiling = Arm("LoRA, full attention: the ceiling", View(None))
    control = Arm("LoRA, nothing retrieved", sinks)
    # What follows an @ in a name holds for its control and ceiling too (see collect.py).
    ranks = {
        f"{name}@rank{rank}": replace(arm, what=f"{arm.what}, rank {rank}", rank=rank)
        for rank in (4, 64)
        for name, arm in (("control", control), ("full+trained", ceiling), ("rosa", both))
    }
    return {
        "full": Arm("full attention, untrained", View(None), rank=0),
        "window": Arm("window without sinks, untrained", replace(sinks, sinks=0), rank=0),
        "window+sinks": Arm("window and sinks, untrained", sinks, rank=0),
        "recall-untrained": Arm("recalled spans, untrained, no parameters", recall, rank=0),
        "full+trained": ceiling,
        "full+route": replace(route, what="LoRA and token route, full attention", view=View(None)),
        "full+route-own": replace(
            route_own, what=f"{route_own.what}, full attention", view=View(None)
        ),
        "control": control,
        "route-own": route_own,
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
            view=replace(recall, layers=every[::2]),
        ),
        # Spans hidden in a share of the batches; in all of them the spans join in evaluation only.
        "rosa+hide25": replace(both, what=f"{both.what}, spans hidden in 25%", hide=0.25),
        "rosa+hide50": replace(both, what=f"{both.what}, spans hidden in 50%", hide=0.5),
        "rosa+hide100": replace(both, what=f"{both.what}, spans in evaluation only", hide=1.0),
        "rosa+hide50+repeat": replace(
            both, what=f"{both.what}, spans hidden in 50%, repeated passages", hide=0.5, repeat=2
        ),
        "route-K1": replace(route, what="LoRA and token route of 1 candidate", route=1),
        "route-K4": replace(route, what="LoRA and token route of 4 candidates", route=4),
        "route+repeat": replace(route, what="LoRA, token route, repeated passages", repeat=2),
        "route-only": replace(route, what="token route alone, nothing else trained", rank=0),
        "adapters-own": replace(bits, what="LoRA and own value, same parameters", retrieve=False),
        "adapters": bits,
        "adapters-token": token,
        "adapters-own-all": replace(
            bits, what="LoRA and own value, in all layers", adapters=every, retrieve=False
        ),
        "adapters-token-all": replace(token, what=f"{token.what}, in all layers", adapters=every),
        "adapters-token-bit1": replace(
            token, what=f"{token.what}, 1 bit", options=(*token.options, ("bits", 1))
        ),
        "adapters-token-bit8": replace(
            token, what=f"{token.what}, 8 bits", options=(*token.options, ("bits", 8))
        ),
        "adapters-token-alone": replace(token, what="no LoRA, bit routes at token matches", rank=0),
        "adapters-own-alone": replace(bits, what="no LoRA, own value", rank=0, retrieve=False),
        "route+own": replace(
            route,
            what="no LoRA, token route and own value",
            rank=0,
            adapters=bits.adapters,
            retrieve=False,
        ),
        "route+adapters": replace(
            token, what="LoRA, token route, bit routes at token matches", route=16
        ),
        "rosa+adapters": replace(
            token,
            what="LoRA, token route, spans, bit routes at matches",
            route=16,
            view=recall,
        ),
        "adapters-bit1": learned("1 bit", bits=1),
        "adapters-bit8": learned("8 bits", bits=8),
        "adapters-untied": learned("queries and keys start apart", tied_start=False),
        "adapters-shared": learned("one projection of queries and keys", shared_qk=True),
        # Other estimators cost more a route: all of them, and their reference, with 16.
        "adapters-own-routes16": replace(
            learned("own value instead, 16 routes", routes=16), retrieve=False
        ),
        "adapters-routes16": learned("counterfactual, 16 routes", routes=16),
        "adapters-suffix": learned(
            "suffix_attention, 16 routes", estimator="suffix_attention", routes=16
        ),
        "adapters-bitflip": learned("bitflip, 16 routes", estimator="bitflip", routes=16),
        **{
            f"adapters-{name.replace('_', '-')}": learned(
                f"{name}, straight through, 16 routes",
                estimator=name,
                estimator_options={"straight_through": True},
                routes=16,
            )
            for name in ("soft_scan", "soft_dp")
        },
        **ranks,
    }


ARMS = tuple(arms(256))
"""Names of all arms."""
