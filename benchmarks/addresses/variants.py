"""The variants of the ablation: what is attached and how its addresses are trained.

All have adapters in the same layers with the same number of channels and an own-value input, so
that local adaptation is the same for all and what differs is the retrieved channel. The control
reads its own value in place of every retrieved one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from benchmarks.addresses.rule import Rule

CUT = 20
LAYERS = (20, 22, 24, 26, 28, 29)
TIERS = (1, 2, 4, 8)
ORDERS = (1, 2, 3, 4, 6, 8)


class Variant(NamedTuple):
    """One row of the table.

    Attributes:
        what: a few words for the table.
        rosa: fields of `RosaConfig` beside those that all share.
        tune: fields of `TuneConfig`: rates and the address loss.
        teach_first: steps of the address loss alone, before training; they read the same text.
        reads: "match", or a control that reads something else wherever the match is read: "own",
            the position's own value, or "random", that of any earlier position (see `misread`).
        rule: lengths are corrected by it from the start.
    """

    what: str
    rosa: dict[str, Any]
    tune: Mapping[str, Any] = MappingProxyType({})
    teach_first: int = 0
    reads: Literal["match", "own", "random"] = "match"
    rule: Rule | None = None


TOKEN: dict[str, Any] = {"address": "token"}
HASH: dict[str, Any] = {"address": "hash", "bits": 8, "hash_orders": ORDERS, "min_length": 2}
HASH4: dict[str, Any] = {"address": "hash", "bits": 4, "hash_orders": (1,)}
REFINED: dict[str, Any] = HASH | {"hash_refine": True}
LEARNED: dict[str, Any] = {"address": "learned", "bits": 8}
SELECT: dict[str, Any] = {
    "address": "token",
    "address_candidates": 4,
    "far_distance": 256,
    "select": 64,
    "select_tiers": (0.05, 0.2, 0.4, 0.6, 0.8, 0.95),
    "select_lens": True,
}
LENGTHS: dict[str, Any] = {
    "address": "token",
    "far_distance": 256,
    "far_candidates": 4,
    "length_tiers": TIERS,
    "select": 64,
}
THIRD = {"qk_lr_scale": 0.3}
TENTH = {"qk_lr_scale": 0.1}
SURPLUS = {"qk_lr_scale": 1.0, "address_weight": 1.0, "address_loss": "surplus"}
CHOSEN = {"qk_lr_scale": 1.0, "address_weight": 1.0, "address_loss": "next_token"}
UNTAUGHT = {"qk_lr_scale": 1.0}
FROZEN = {"qk_lr_scale": 0.0}
SLOW = {"qk_lr_scale": 1 / 30}
TAUGHT = {"qk_lr_scale": 1.0, "address_weight": 1.0}

VARIANTS: dict[str, Variant] = {
    "control": Variant("own value twice, nothing retrieved", TOKEN | {"retrieve": False}),
    "token": Variant("token match", TOKEN),
    "token-tiers": Variant("token match, length tiers", TOKEN | {"length_tiers": TIERS}),
    "token-k2-tiers": Variant(
        "token match, 2 candidates, length tiers",
        TOKEN | {"length_tiers": TIERS, "address_candidates": 2},
    ),
    "token-far-tiers": Variant(
        "token match, the latest and the latest beyond the window, length tiers",
        TOKEN | {"length_tiers": TIERS, "far_distance": 256},
    ),
    "token-far-tiers-own": Variant(
        "… same matches and tiers, but the own value is read",
        TOKEN | {"length_tiers": TIERS, "far_distance": 256},
        reads="own",
    ),
    "hash": Variant("8-bit hash of 1 to 8 tokens, two alike in a row, fixed", HASH),
    "hash-refined": Variant("… refined at 1/30 of the rate", REFINED, SLOW),
    "hash-refined-shared": Variant(
        "… refined, shared q and k, 1/30", REFINED | {"shared_qk": True}, SLOW
    ),
    "hash-refined-next": Variant(
        "… refined, taught by next tokens, 1/30",
        REFINED | {"shared_qk": True},
        SLOW | {"address_loss": "next_token"},
    ),
    "hash-refined-teacher": Variant(
        "… refined, taught by full attention",
        REFINED,
        {"qk_lr_scale": 0.3, "address_weight": 1.0, "address_loss": "teacher"},
    ),
    "hash-refined-margin": Variant(
        "… refined, credit within 1.5 of the threshold", REFINED | {"credit_margin": 1.5}, SLOW
    ),
    "hash4": Variant("4-bit hash of the token, fixed: routes that vote", HASH4),
    "hash4-refined-next": Variant(
        "… refined, taught by next tokens, 1/30",
        HASH4 | {"hash_refine": True, "shared_qk": True},
        SLOW | {"address_loss": "next_token"},
    ),
    "learned": Variant("learned, 4 bits, tied start (published)", {"bits": 4}, {"qk_lr_scale": 1}),
    "learned-slow": Variant("learned, 4 bits, tied start, 1/30", {"bits": 4}, SLOW),
    "learned-8": Variant("learned, 8 bits, tied start, 1/30", LEARNED, SLOW),
    "learned-8-full": Variant("… at the rate of the rest", LEARNED, UNTAUGHT),
    "learned-shared": Variant(
        "learned, 8 bits, shared q and k, 1/30", LEARNED | {"shared_qk": True}, SLOW
    ),
    "learned-next": Variant(
        "learned, 8 bits, taught by next tokens",
        LEARNED | {"shared_qk": True},
        TAUGHT | {"address_loss": "next_token"},
    ),
    "learned-teacher": Variant(
        "learned, 8 bits, taught by full attention",
        LEARNED,
        TAUGHT | {"address_loss": "teacher"},
    ),
    "learned-next-2": Variant(
        "… and at least two symbols alike",
        LEARNED | {"shared_qk": True, "min_length": 2},
        TAUGHT | {"address_loss": "next_token"},
    ),
    "learned-suffix-attention": Variant(
        "learned, 8 bits, suffix_attention",
        LEARNED | {"estimator": "suffix_attention"},
        SLOW,
    ),
    "hash-refined-full": Variant(
        "… refined, shared q and k, taught by next tokens, full rate, codes 0.3 from the threshold",
        REFINED | {"shared_qk": True, "hash_scale": 0.3},
        TAUGHT | {"address_loss": "next_token"},
    ),
    "learned-next-soft-scan": Variant(
        "learned, 8 bits, taught by next tokens, soft_scan",
        LEARNED | {"shared_qk": True, "estimator": "soft_scan"},
        TAUGHT | {"address_loss": "next_token"},
    ),
    "learned-next-suffix-attention": Variant(
        "learned, 8 bits, taught by next tokens, suffix_attention",
        LEARNED | {"shared_qk": True, "estimator": "suffix_attention"},
        TAUGHT | {"address_loss": "next_token"},
    ),
    "select": Variant(
        "learned choice among 4 token matches and one beyond the window, taught by next tokens",
        SELECT,
        CHOSEN,
    ),
    "select-own": Variant(
        "… same choice and tiers, but the own value is read", SELECT, CHOSEN, reads="own"
    ),
    "select-random": Variant(
        "… same choice and tiers, but any earlier value is read", SELECT, CHOSEN, reads="random"
    ),
    "select-no-lens": Variant(
        "… without the model's logits of the candidates", SELECT | {"select_lens": False}, CHOSEN
    ),
    "select-first": Variant(
        "… taught for 60 steps before anything else trains", SELECT, CHOSEN, teach_first=60
    ),
    "select-frozen": Variant("… not trained: the plain lens", SELECT, FROZEN),
    "select-untaught": Variant("… trained by the language-model loss alone", SELECT, UNTAUGHT),
    "select-taught-only": Variant(
        "… trained by next tokens alone", SELECT | {"select_credit": False}, CHOSEN
    ),
    "select-no-tiers": Variant("… without tiers", SELECT | {"select_tiers": ()}, CHOSEN),
    "select-near": Variant(
        "learned choice whether to trust the token match, taught by next tokens",
        SELECT | {"address_candidates": 1, "far_distance": None},
        CHOSEN,
    ),
    "lengths": Variant(
        "… and learned lengths choose (trained by the loss alone)", LENGTHS, UNTAUGHT
    ),
    "lengths-own": Variant(
        "… same choice and tiers, but the own value is read", LENGTHS, UNTAUGHT, reads="own"
    ),
    "lengths-random": Variant(
        "… same choice and tiers, but any earlier value is read", LENGTHS, UNTAUGHT, reads="random"
    ),
    "lengths-trust": Variant(
        "… with one candidate of each group: trust alone is learned",
        LENGTHS | {"far_candidates": 1},
        UNTAUGHT,
    ),
    "lengths-choice": Variant(
        "… tiers ask for the match's own length: the choice alone is learned",
        LENGTHS | {"select_trust": False},
        UNTAUGHT,
    ),
    "lengths-surplus": Variant("… taught by the surplus as well", LENGTHS, SURPLUS),
    "lengths-fast": Variant("… at three times the rate", LENGTHS, {"qk_lr_scale": 3.0}),
    "lengths-frozen": Variant("… not trained: `token-far-tiers` again", LENGTHS, FROZEN),
    "lengths-near-half": Variant(
        "… not trained: nearer than the window counts for half",
        LENGTHS,
        FROZEN,
        rule=Rule(near=-1.0),
    ),
    "lengths-written": Variant(
        "… not trained: four numbers read off what training finds",
        LENGTHS,
        FROZEN,
        rule=Rule(near=-0.7, far=0.3, single=-0.8, long=0.7),
    ),
    "lengths-third": Variant("… at 0.3 of the rate", LENGTHS, THIRD),
    "lengths-third-trust": Variant(
        "… at 0.3 of the rate, trust alone", LENGTHS | {"far_candidates": 1}, THIRD
    ),
    "lengths-third-choice": Variant(
        "… at 0.3 of the rate, the choice alone", LENGTHS | {"select_trust": False}, THIRD
    ),
    "lengths-third-lens": Variant(
        "… at 0.3 of the rate, with the model's logits of the candidates",
        LENGTHS | {"select_lens": True},
        THIRD,
    ),
    "lengths-third-far8": Variant(
        "… at 0.3 of the rate, eight candidates beyond the window",
        LENGTHS | {"far_candidates": 8},
        THIRD,
    ),
    "lengths-tenth": Variant("… at 0.1 of the rate", LENGTHS, TENTH),
    "lengths-tenth-surplus": Variant(
        "… at 0.1 of the rate, taught by the surplus", LENGTHS, SURPLUS | TENTH
    ),
    "lengths-tenth-surplus-lens": Variant(
        "… at 0.1 of the rate, taught by the surplus, with the model's logits",
        LENGTHS | {"select_lens": True},
        SURPLUS | TENTH,
    ),
    "lengths-tenth-surplus-choice": Variant(
        "… at 0.1 of the rate, taught by the surplus, the choice alone",
        LENGTHS | {"select_trust": False},
        SURPLUS | TENTH,
    ),
    "ceiling": Variant("full attention, own value", TOKEN | {"retrieve": False, "window": None}),
}


def rosa_fields(name: str, layers: tuple[int, ...], window: int, sinks: int) -> dict[str, Any]:
    """Fields of the `RosaConfig` of a variant."""
    shared: dict[str, Any] = {"window": window, "sink_tokens": sinks, "layers": layers}
    return shared | {"own_value": True, "projection_rank": None} | VARIANTS[name].rosa
