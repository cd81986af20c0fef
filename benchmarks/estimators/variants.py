"""What is compared: every registered estimator, and what frames them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rosakit.tuning.schedules import Schedule


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        estimator: name in the registry.
        options: its options.
        schedules: options that move with the step.
        retrieve: False: every position reads its own value.
        full_attention: attention sees everything, and the adapters read their own value.
        note: what it shows.
    """

    estimator: str = "counterfactual"
    options: dict[str, Any] = field(default_factory=dict)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    retrieve: bool = True
    full_attention: bool = False
    note: str = ""


# A pair that differs in one of M bits has the equality sigmoid(M - 1 - 1 / tau), so temperatures
# have to end low for wide routes to tell symbols apart.
_SOFT = {"tau": Schedule(0.5, 0.1, until=0.8)}
_HARD = {"tau": Schedule(0.3, 0.1, until=0.8)}

VARIANTS: dict[str, Variant] = {
    "counterfactual": Variant("counterfactual", note="default options"),
    "bitflip": Variant("bitflip", note="every flip"),
    "bitflip_sampled": Variant("bitflip", {"stride": 64}, note="1 flip in 32, unbiased"),
    "bitflip_inverse": Variant(
        "bitflip", {"slope": "inverse"}, note="every flip, the slope of RWKV-8's reference"
    ),
    "soft_dp": Variant("soft_dp", {}, _SOFT, note="soft forward, tau 0.5 to 0.1"),
    "soft_dp_st": Variant(
        "soft_dp", {"straight_through": True}, _HARD, note="hard forward, tau 0.3 to 0.1"
    ),
    "soft_scan": Variant("soft_scan", {}, _SOFT, note="soft forward, tau 0.5 to 0.1"),
    "soft_scan_st": Variant(
        "soft_scan", {"straight_through": True}, _HARD, note="hard forward, tau 0.3 to 0.1"
    ),
    "suffix_attention": Variant("suffix_attention", note="default options"),
    "frozen": Variant("soft_dp", {"tau": None}, note="addresses stay at their start"),
    "control": Variant(retrieve=False, note="reads its own value"),
    "attention": Variant(retrieve=False, full_attention=True, note="full attention, no retrieval"),
}
