"""`TuneConfig`: everything that decides a training run, readable from YAML.

Free of transformers, so that the command line can show its help quickly; the help text of each
field becomes the help of the flag of the same name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.data import DataConfig

__all__ = ["TuneConfig", "load_config"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("cosine", "linear", "constant"),
    "dtype": ("auto", "float32", "bfloat16"),
}
_POSITIVE = ("length", "batch_size", "accumulate", "log_every", "keep_checkpoints", "eval_blocks")
_NOT_NEGATIVE = ("save_every", "eval_every", "lora_rank", "seed")
_RATES = ("lr", "lr_token_route", "lr_lora", "qk_lr_scale", "weight_decay", "max_grad_norm")


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def _default_rosa() -> RosaConfig:
    """The token route alone: a few hundred parameters, trained in minutes on a CPU."""
    return RosaConfig(adapters=False, token_route=True)


@dataclass
class TuneConfig:
    """One training run: model, data, what is added, and how it is trained.

    Raises:
        InvalidInputError: a value out of range, or nothing to train.
        InvalidTypeError: a value of the wrong type.
    """

    model: str = _option("", "Model: a hub name, a local folder, or the path of a GGUF file.")
    data: DataConfig = field(
        default_factory=DataConfig, metadata={"help": "Texts and their layout."}
    )
    rosa: RosaConfig | None = field(
        default_factory=_default_rosa,
        metadata={"help": "What is added to the model; none to train LoRA alone."},
    )
    output: str = _option("runs/tune", "Folder of the result.")
    gguf_file: str | None = _option(None, "GGUF file inside the model's folder or hub repository.")
    length: int = _option(1024, "Tokens a training sequence.")
    steps: int | None = _option(None, "Optimizer steps; none to derive them from tokens.")
    tokens: int | None = _option(
        None, "Tokens to train on; none, without steps, for one pass over the data."
    )
    batch_size: int = _option(1, "Sequences a forward pass.")
    accumulate: int = _option(1, "Forward passes an optimizer step.")
    lr: float = _option(3e-4, "Peak learning rate of the adapters.")
    lr_token_route: float = _option(2e-2, "Peak learning rate of the token route.")
    lr_lora: float = _option(2e-4, "Peak learning rate of LoRA.")
    qk_lr_scale: float = _option(
        0.1, "Learning rate of the adapters' query and key projections, relative to theirs."
    )
    warmup: float = _option(0.05, "Share of the steps over which the learning rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = _option(
        "cosine", "How the learning rate falls after the warm-up."
    )
    weight_decay: float = _option(0.0, "Decoupled weight decay of matrices.")
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm; 0 for never.")
    seed: int = _option(0, "Seed of initialisation, data order and copied passages.")
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "Type of the frozen weights; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    device: str = _option("auto", "cpu, cuda or auto.")
    gradient_checkpointing: bool = _option(
        False, "Recompute layers in the backward pass: less memory, more time."
    )
    lora_rank: int = _option(0, "Rank of LoRA on all linear layers; 0 for none.")
    lora_alpha: float | None = _option(None, "Scale of LoRA; none for twice its rank.")
    control: bool = _option(False, "Train the control: everything alike, but nothing is retrieved.")
    log_every: int = _option(10, "Steps between two lines of loss and health.")
    save_every: int = _option(100, "Steps between two checkpoints; 0 for the last one only.")
    keep_checkpoints: int = _option(2, "Checkpoints that are kept.")
    eval_every: int = _option(0, "Steps between two held-out losses; 0 for the end only.")
    eval_blocks: int = _option(8, "Held-out sequences that are measured.")
    resume: bool = _option(False, "Go on from the last checkpoint in the output folder.")

    def __post_init__(self) -> None:
        self.model, self.output = os.fspath(self.model), os.fspath(self.output)
        if isinstance(self.data, Mapping):
            self.data = _build(DataConfig, self.data, "data")
        elif not isinstance(self.data, DataConfig):
            self.data = DataConfig(sources=self.data)
        if isinstance(self.rosa, Mapping):
            # Fields that are not given keep the defaults of a run, not those of a bare attach.
            self.rosa = RosaConfig.from_dict({**_default_rosa().to_dict(), **self.rosa})
        for name in ("steps", "tokens"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in _POSITIVE:
            _whole(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            _whole(name, getattr(self, name), 0)
        for name in (*_RATES, "warmup"):
            value = getattr(self, name)
            if isinstance(value, str):
                # YAML reads 1e-4 (without a point) as text.
                value = _number(name, value)
                setattr(self, name, value)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidTypeError(f"TuneConfig.{name} must be a number, got {value!r}")
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidInputError(f"TuneConfig.{name} must be 0 or more, got {value}")
        if self.warmup > 1:
            raise InvalidInputError(f"TuneConfig.warmup is a share of the steps: {self.warmup}")
        for name in ("gradient_checkpointing", "control", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidTypeError(
                    f"TuneConfig.{name} must be true or false, got {getattr(self, name)!r}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InvalidInputError(
                    f"TuneConfig.{name} must be one of {', '.join(allowed)}; got "
                    f"{getattr(self, name)!r}"
                )
        if self.length < 2:
            raise InvalidInputError(f"TuneConfig.length must be at least 2, got {self.length}")
        if self.steps is not None and self.tokens is not None:
            raise InvalidInputError("give steps or tokens, not both")
        trains = self.rosa is not None and (self.rosa.adapters or self.rosa.token_route)
        if not trains and self.lora_rank == 0:
            raise InvalidInputError(
                "nothing to train: set adapters, token_route, or a lora_rank above 0"
            )

    def attached(self) -> RosaConfig | None:
        """What is attached to the model: `rosa`, without retrieval for the control."""
        if self.rosa is None or not self.control:
            return self.rosa
        return dataclasses.replace(self.rosa, retrieve=False)

    def total_steps(self, blocks: int) -> int:
        """Optimizer steps, given the number of blocks of one pass over the data."""
        if self.steps is not None:
            return self.steps
        a_step = self.batch_size * self.accumulate
        if self.tokens is not None:
            return max(1, math.ceil(self.tokens / (a_step * self.length)))
        return max(1, blocks // a_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values that YAML and JSON can hold."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["data"] = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self.data).items()
        }
        out["rosa"] = None if self.rosa is None else self.rosa.to_dict()
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneConfig:
        """The inverse of :meth:`to_dict`; missing fields keep their defaults.

        Raises:
            InvalidInputError: an unknown field (the message names the nearest one).
        """
        return _build(cls, values, "the configuration")


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file with the fields of a :class:`TuneConfig`, without checking them.

    Raises:
        InvalidInputError: no such file, or one that holds no mapping.
    """
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"cannot read configuration {path}: {error.strerror}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidInputError(
            f"{path} must hold a mapping of fields, got {type(values).__name__}"
        )
    return values


_Config = TypeVar("_Config", TuneConfig, DataConfig)


def _build(kind: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            raise InvalidInputError(f"{where} has no field {name!r}; {hint}")
    return kind(**values)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidTypeError(f"TuneConfig.{name} must be a number, got {text!r}") from error


def _whole(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"TuneConfig.{name} must be an integer, got {value!r}")
    if value < low:
        raise InvalidInputError(f"TuneConfig.{name} must be at least {low}, got {value}")
