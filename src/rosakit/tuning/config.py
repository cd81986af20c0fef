"""`RosaConfig`: everything that decides what `attach` adds to a model.

Plain dataclass, free of transformers and peft: the help text of each field becomes the help of the
command line and the documentation.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rosakit.errors import InvalidInputError, InvalidTypeError

__all__ = ["RosaConfig"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "inject": ("post_attn", "pre_attn"),
    "unmatched": ("zero", "self", "null"),
    "granularity": ("token", "run"),
    "successor": ("available", "strict"),
    "address": ("learned", "token"),
    "adapter_dtype": ("float32", "bfloat16", "float16", "auto"),
}


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class RosaConfig:
    """What to add to a pretrained decoder and how.

    Raises:
        InvalidInputError: a value out of range, or options that exclude each other.
        InvalidTypeError: a value of the wrong type.
    """

    window: int | None = _option(
        512, "Attention window in tokens, the current one included; none leaves attention as it is."
    )
    sink_tokens: int = _option(
        4, "First tokens of each sequence or document that stay visible beyond the window."
    )
    global_layers: tuple[int, ...] = _option(
        (), "Indices of layers that keep full attention; negative ones count from the last."
    )
    adapters: bool = _option(True, "Add a RosaAdapter to the decoder layers.")
    layers: tuple[int, ...] | None = _option(
        None, "Indices of the layers that get an adapter; none for all of them."
    )
    bits: int = _option(4, "Bits per route, 1 to 16 (1 to 8 on a GPU).")
    routes: int | None = _option(None, "Routes per adapter; none for hidden size / bits.")
    estimator: str = _option(
        "counterfactual", "Gradient estimator of the discrete retrieval, by name."
    )
    estimator_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the estimator, as a mapping."}
    )
    inject: Literal["post_attn", "pre_attn"] = _option(
        "post_attn", "Add the result to the attention's output, or mix it into its input."
    )
    unmatched: Literal["zero", "self", "null"] = _option(
        "zero", "What an unmatched position reads: zeros, its own value, or a learned vector."
    )
    granularity: Literal["token", "run"] = _option(
        "token", "Match symbol by symbol, or by runs of equal symbols."
    )
    successor: Literal["available", "strict"] = _option(
        "available", "Run granularity only: skip runs without a successor, or read nothing there."
    )
    max_length: int | None = _option(
        None, "Longer matches count as this long; none for unlimited length."
    )
    min_length: int = _option(1, "Shorter matches of an adapter count as no match.")
    own_value: bool = _option(
        False, "Give each position its own value as a second input of the output projection."
    )
    retrieve: bool = _option(
        True, "False is the control: every retrieved value is replaced by the position's own."
    )
    address: Literal["learned", "token"] = _option(
        "learned", "Where adapters read: at matches of learned symbols, or of token ids."
    )
    tied_start: bool = _option(
        True, "Start the key projection as a copy of the query projection, so that matches exist."
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option(
        "float32", "Data type of the adapters' parameters; auto follows the model."
    )
    token_route: bool = _option(
        False, "Mix the successors of exact token matches into the output distribution."
    )
    token_candidates: int = _option(4, "Token route: distinct successors that compete.")
    token_min_length: int = _option(1, "Token route: shorter matches are no candidates.")
    token_units: int = _option(16, "Token route: hidden units of its gate.")

    def __post_init__(self) -> None:
        self.global_layers = _indices("global_layers", self.global_layers)
        self.layers = None if self.layers is None else _indices("layers", self.layers)
        for name in ("window", "routes", "max_length"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1)
        for name, low in (
            ("sink_tokens", 0),
            ("bits", 1),
            ("min_length", 1),
            ("token_candidates", 1),
            ("token_min_length", 1),
            ("token_units", 0),
        ):
            _integer(name, getattr(self, name), low)
        for name in ("adapters", "own_value", "retrieve", "tied_start", "token_route"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(
                    f"RosaConfig.{name} must be true or false, got {getattr(self, name)!r}"
                )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidInputError(
                    f"RosaConfig.{name} must be one of {', '.join(allowed)}; got {value!r}"
                )
        if not isinstance(self.estimator, str) or not isinstance(self.estimator_options, Mapping):
            raise InvalidTypeError(
                "RosaConfig.estimator must be a name and estimator_options a mapping; got "
                f"{self.estimator!r} and {self.estimator_options!r}"
            )
        self.estimator_options = dict(self.estimator_options)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.bits > 16:
            raise InvalidInputError(f"RosaConfig.bits must be at most 16, got {self.bits}")
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
        if self.window is None and self.global_layers:
            raise InvalidInputError(
                "RosaConfig.global_layers only means something beside a window; set window, or "
                "leave global_layers empty"
            )
        if self.window is None and not self.adapters and not self.token_route:
            raise InvalidInputError(
                "this RosaConfig adds nothing: set window, adapters=True or token_route=True"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        result = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in result.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RosaConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            InvalidInputError: a key that is no field (the message names the nearest one).
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                )
                raise InvalidInputError(f"RosaConfig has no field {name!r}; {hint}")
        return cls(**values)

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RosaConfig:
        """The inverse of :meth:`to_json`.

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


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"RosaConfig.{name} must be an integer, got {value!r}")
    if value < low:
        raise InvalidInputError(f"RosaConfig.{name} must be at least {low}, got {value}")


def _indices(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise InvalidTypeError(f"RosaConfig.{name} must be a list of layer indices, got {value!r}")
    items = tuple(value)
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise InvalidTypeError(f"RosaConfig.{name} must hold integers only, got {list(items)}")
    if len(set(items)) != len(items):
        raise InvalidInputError(f"RosaConfig.{name} names a layer twice: {list(items)}")
    return items
