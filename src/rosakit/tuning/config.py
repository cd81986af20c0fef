"""`RosaConfig`: everything that decides what `attach` adds to a model.

Plain dataclass, free of transformers and peft: the help text of each field becomes the help of the
command line and the documentation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rosakit.errors import InvalidInputError
from rosakit.layers.address_options import check_address_options
from rosakit.ops.estimators.registry import check_options
from rosakit.ops.value_heads import check_value_groups
from rosakit.tuning.fields import check_fields, check_names, option

__all__ = ["RosaConfig"]

_BEFORE = {"projection_rank": None}
"""Values of fields before they existed, where those differ from the defaults of today."""


@dataclass
class RosaConfig:
    """What to add to a pretrained decoder and how.

    Raises:
        InvalidInputError: a value out of range, or options that exclude each other.
        InvalidTypeError: a value of the wrong type.
    """

    window: int | None = option(
        512,
        "Attention window in tokens, the current one included; none leaves attention as it is.",
        low=1,
    )
    sink_tokens: int = option(
        4, "First tokens of each sequence or document that stay visible beyond the window.", low=0
    )
    global_layers: tuple[int, ...] = option(
        (), "Indices of layers that keep full attention; negative ones count from the last."
    )
    recall: int = option(
        0,
        "Recalled spans: the surroundings of this many exact token matches join the window of "
        "every windowed layer, without parameters; 0 for none.",
        low=0,
    )
    recall_before: int = option(
        32, "Tokens of a recalled span before what followed the match.", low=0
    )
    recall_after: int = option(
        32, "Tokens of a recalled span from what followed the match on.", low=1
    )
    recall_offload: bool = option(
        False, "Keep the keys and values beyond the window in host memory; only recalled ones move."
    )
    adapters: bool = option(True, "Add a RosaAdapter to the decoder layers.")
    layers: tuple[int, ...] | None = option(
        None, "Indices of the layers that get an adapter; none for all of them."
    )
    bits: int = option(4, "Bits per route, 1 to 16 (1 to 8 on a GPU).", low=1, high=16)
    routes: int | None = option(None, "Routes per adapter; none for hidden size / bits.", low=1)
    estimator: str = option(
        "counterfactual", "Gradient estimator of the discrete retrieval, by name."
    )
    estimator_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the estimator, as a mapping."}
    )
    counterfactual_stride: int = option(
        1,
        "Counterfactual estimator: credit one of so many query positions, drawn anew for other "
        "bits and counted as often; 1 for every position.",
        low=1,
    )
    inject: Literal["post_attn", "pre_attn"] = option(
        "post_attn", "Add the result to the attention's output, or mix it into its input."
    )
    unmatched: Literal["zero", "self", "null"] = option(
        "zero", "What an unmatched position reads: zeros, its own value, or a learned vector."
    )
    granularity: Literal["token", "run"] = option(
        "token", "Match symbol by symbol, or by runs of equal symbols."
    )
    successor: Literal["available", "strict"] = option(
        "available", "Run granularity only: skip runs without a successor, or read nothing there."
    )
    max_length: int | None = option(
        None, "Longer matches count as this long; none for unlimited length.", low=1
    )
    min_length: int = option(1, "Shorter matches of an adapter count as no match.", low=1)
    value_groups: int = option(
        1,
        "Neighbouring routes that read one value head; a divisor of the routes. The value "
        "projection shrinks by this factor.",
        low=1,
    )
    own_value: bool = option(
        False, "Give each position its own value as a second input of the output projection."
    )
    retrieve: bool = option(
        True, "False is the control: every retrieved value is replaced by the position's own."
    )
    address: Literal["learned", "token", "hash"] = option(
        "learned",
        "Where adapters read: at matches of learned symbols, of token ids, or of hash codes of "
        "token contexts.",
    )
    tied_start: bool = option(
        True, "Start the key projection as a copy of the query projection, so that matches exist."
    )
    shared_qk: bool = option(
        False, "One projection for queries and keys of learned addresses, with summed gradients."
    )
    address_candidates: int = option(
        1, "Address token: distinct successors that the routes read in turn.", low=1
    )
    far_distance: int | None = option(
        None,
        "Address token: one candidate more, the best match at least this many tokens back (the "
        "window, for what attention no longer sees); none for no such candidate.",
        low=1,
    )
    far_candidates: int = option(
        1,
        "With far_distance: candidates beyond it, the best match and further distinct successors.",
        low=1,
    )
    length_tiers: tuple[int, ...] = option(
        (),
        "Address token and fixed hash: minimal match lengths that the routes take in turn; empty "
        "for min_length in all of them. With select, lengths that learning corrects.",
    )
    select: int = option(
        0,
        "Address token: width of learned products of hidden states that choose which candidate all "
        "routes read; 0 deals candidates to the routes by rank.",
        low=0,
    )
    select_tiers: tuple[float, ...] = option(
        (),
        "Learned choice: shares of the chosen candidate below which routes read nothing, taken in "
        "turn; empty for reading everywhere.",
    )
    select_credit: bool = option(
        True,
        "Learned choice: it learns from the language-model loss as well, straight through the hard "
        "read; false leaves it to the address loss.",
    )
    select_trust: bool = option(
        True,
        "Learned lengths: length tiers ask for the learned length; false for the match's own.",
    )
    select_lens: bool = option(
        False,
        "Learned choice: score candidates by the model's own logits of their tokens as well, as "
        "far as the layer's input knows them.",
    )
    hash_orders: tuple[int, ...] = option(
        (1, 2, 3, 4), "Address hash: tokens a context, dealt to the routes in turn."
    )
    hash_refine: bool = option(
        False, "Address hash: add learned projections, which start at zero, to the codes."
    )
    hash_scale: float = option(
        1.0, "Address hash: how far a refinement has to go to change a code bit.", above=0
    )
    hash_seed: int = option(0, "Address hash: another seed gives other codes.", low=0)
    credit_margin: float | None = option(
        None,
        "Queries and keys learn only within this distance of the threshold; none for everywhere.",
        above=0,
    )
    projection_rank: int | None = option(
        64,
        "Rank of an adapter's projections; none for whole matrices (about ten times as large).",
        low=1,
    )
    share_projections: bool = option(
        False, "One set of projections for all layers; each layer keeps its own levels e0 and e1."
    )
    backend: Literal["auto", "cpu", "cuda", "pipeline"] = option(
        "auto",
        "Who matches whole sequences: auto (the GPU where there is one), or pipeline: the CPU, "
        "beside the layer's attention.",
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Data type of the adapters' parameters; auto follows the model."
    )
    token_route: bool = option(
        False, "Mix the successors of exact token matches into the output distribution."
    )
    token_candidates: int = option(4, "Token route: distinct successors that compete.", low=1)
    token_min_length: int = option(1, "Token route: shorter matches are no candidates.", low=1)
    token_units: int = option(16, "Token route: hidden units of its gate.", low=0)

    def __post_init__(self) -> None:
        check_fields(self, RosaConfig)
        self._check_combinations()

    def _check_combinations(self) -> None:
        for name in ("global_layers", "layers"):
            items = getattr(self, name) or ()
            if len(set(items)) != len(items):
                raise InvalidInputError(f"RosaConfig.{name} names a layer twice: {list(items)}")
        if self.routes is not None:  # otherwise the model's width decides
            check_value_groups(self.value_groups, self.routes)
        check_options(self.estimator, self.estimator_options)
        if self.counterfactual_stride > 1 and self.estimator != "counterfactual":
            raise InvalidInputError(
                f"RosaConfig.counterfactual_stride={self.counterfactual_stride} samples the flips "
                f"of estimator='counterfactual', not {self.estimator!r}; leave it at 1"
            )
        if self.counterfactual_stride > 1 and "stride" in self.estimator_options:
            raise InvalidInputError(
                "RosaConfig.counterfactual_stride and estimator_options['stride'] say the same; "
                "give one of them"
            )
        if self.far_distance is not None and self.address != "token":
            raise InvalidInputError(
                f"RosaConfig.far_distance={self.far_distance} adds a candidate to token matches; "
                "use address='token', or leave it at none"
            )
        if self.far_candidates > 1 and self.far_distance is None:
            raise InvalidInputError(
                f"RosaConfig.far_candidates={self.far_candidates} lie beyond far_distance and "
                "there is none; set far_distance, or leave far_candidates at 1"
            )
        check_address_options(
            self.address,
            estimator=self.estimator,
            estimator_options=self.all_estimator_options,
            learned=self.learns_address,
            shared_qk=self.shared_qk,
            candidates=self.address_candidates + self.far_count,
            far_candidates=self.far_count,
            length_tiers=self.length_tiers,
            select=self.select,
            select_tiers=self.select_tiers,
            select_trust=self.select_trust,
            select_lens=self.select_lens,
            hash_orders=self.hash_orders,
            hash_refine=self.hash_refine,
            hash_scale=self.hash_scale,
            credit_margin=self.credit_margin,
        )
        if self.backend == "pipeline" and self.estimator != "counterfactual":
            raise InvalidInputError(
                "RosaConfig.backend='pipeline' serves estimator='counterfactual', not "
                f"{self.estimator!r}; use backend='auto'"
            )
        if self.max_length is not None and self.max_length < self.min_length:
            raise InvalidInputError(
                f"RosaConfig.max_length ({self.max_length}) is below min_length "
                f"({self.min_length}): nothing could ever match"
            )
        if self.address == "token" and self.granularity != "token":
            raise InvalidInputError(
                "RosaConfig.address='token' matches token ids one by one; use granularity='token'"
            )
        if self.address == "token" and self.max_length is not None:
            raise InvalidInputError(
                "RosaConfig.address='token' has no length limit; leave max_length at none"
            )
        if self.window is None and self.recall:
            raise InvalidInputError(
                "RosaConfig.recall adds to a window and there is none; set window, or recall=0"
            )
        if self.window is None and self.global_layers:
            raise InvalidInputError(
                "RosaConfig.global_layers only means something beside a window; set window, or "
                "leave global_layers empty"
            )
        if self.window is None and not self.adapters and not self.token_route:
            raise InvalidInputError(
                "this RosaConfig adds nothing: set window, adapters=True or token_route=True"
            )

    @property
    def learns_address(self) -> bool:
        """Whether adapters have trained projections of queries and keys."""
        return self.address == "learned" or (self.address == "hash" and self.hash_refine)

    @property
    def far_count(self) -> int:
        """Candidates beyond a distance; 0 without `far_distance`."""
        return self.far_candidates if self.far_distance is not None else 0

    @property
    def all_estimator_options(self) -> dict[str, Any]:
        """Options of the estimator, those included that are fields of their own."""
        if self.counterfactual_stride == 1:
            return self.estimator_options
        return {**self.estimator_options, "stride": self.counterfactual_stride}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        result = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in result.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RosaConfig:
        """The inverse of `to_dict`.

        Raises:
            InvalidInputError: a key that is no field (the message names the nearest one).
        """
        check_names(cls, values, "RosaConfig")
        return cls(**values)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> RosaConfig:
        """`from_dict` of stored values: fields that are younger than the file get what it had."""
        return cls.from_dict({**_BEFORE, **values})

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RosaConfig:
        """The inverse of `to_json`.

        Raises:
            InvalidInputError: text that is no JSON object, or an unknown key.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InvalidInputError(f"not a JSON configuration: {error}") from error
        if not isinstance(values, dict):
            raise InvalidInputError(
                f"a configuration is a JSON object, got {type(values).__name__}"
            )
        return cls.from_dict(values)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Help text of each field."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls)}
