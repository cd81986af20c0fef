"""`TuneConfig`: everything that decides a training run, readable from YAML.

Free of transformers, so that the command line can show its help quickly; the help text of each
field becomes the help of the flag of the same name.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rosakit.errors import InvalidInputError
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.data import DataConfig
from rosakit.tuning.fields import check_fields, check_names, option
from rosakit.tuning.schedules import read_schedules

__all__ = ["TuneConfig", "load_config"]


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

    model: str = option("", "Model: a hub name, a local folder, or the path of a GGUF file.")
    data: DataConfig = field(
        default_factory=DataConfig, metadata={"help": "Texts and their layout."}
    )
    rosa: RosaConfig | None = field(
        default_factory=_default_rosa,
        metadata={"help": "What is added to the model; none to train LoRA alone."},
    )
    output: str = option("runs/tune", "Folder of the result.")
    gguf_file: str | None = option(None, "GGUF file inside the model's folder or hub repository.")
    length: int = option(1024, "Tokens a training sequence.", low=2)
    steps: int | None = option(None, "Optimizer steps; none to derive them from tokens.", low=1)
    tokens: int | None = option(
        None, "Tokens to train on; none, without steps, for one pass over the data.", low=1
    )
    batch_size: int = option(1, "Sequences a forward pass.", low=1)
    accumulate: int = option(1, "Forward passes an optimizer step.", low=1)
    lr: float = option(3e-4, "Peak learning rate of the adapters.", low=0)
    lr_token_route: float = option(2e-2, "Peak learning rate of the token route.", low=0)
    lr_lora: float = option(2e-4, "Peak learning rate of LoRA.", low=0)
    qk_lr_scale: float = option(
        0.1, "Learning rate of the adapters' query and key projections, relative to theirs.", low=0
    )
    base_from: float | None = option(
        None,
        "Share of the steps after which the base model's own weights train as well (the second "
        "stage); none keeps them frozen.",
        low=0,
        below=1,
    )
    lr_base: float = option(1e-5, "Peak learning rate of the base model's weights.", low=0)
    second_stage_lr_scale: float = option(
        1.0, "Learning rates of what was added, in the second stage, relative to the first.", low=0
    )
    warmup: float = option(
        0.05, "Share of the steps over which the learning rate rises.", low=0, high=1
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "How the learning rate falls after the warm-up."
    )
    estimator_schedules: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Options of the estimator that move with training, like "
            "{tau: {start: 1.0, end: 0.1}}; also shape (geometric, linear, cosine), begin, until."
        },
    )
    weight_decay: float = option(0.0, "Decoupled weight decay of matrices.", low=0)
    max_grad_norm: float = option(
        1.0, "Gradients are scaled down to this norm; 0 for never.", low=0
    )
    address_loss: Literal["none", "next_token", "surplus", "teacher"] = option(
        "none",
        "Teach learned addresses directly: positions with the same next token find each other; a "
        "learned choice finds the next token where the model without adapters lacks it (surplus); "
        "or learned symbols find what full attention of the same model reads beyond the window.",
    )
    address_weight: float = option(
        0.1, "Weight of the address loss beside the language-model loss.", above=0
    )
    address_samples: int = option(128, "Address loss: queries a sequence and step.", low=1)
    seed: int = option(0, "Seed of initialisation, data order and copied passages.", low=0)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Type of the frozen weights; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Type of the computation (autocast; float16 with loss scaling); auto is bfloat16 on a GPU "
        "and what accelerate launch says elsewhere.",
    )
    compile: bool = option(False, "Compile the model with torch.compile.")
    device: str = option("auto", "cpu, cuda or auto.")
    gradient_checkpointing: bool = option(
        False, "Recompute layers in the backward pass: less memory, more time."
    )
    lora_rank: int = option(0, "Rank of LoRA on all linear layers; 0 for none.", low=0)
    lora_alpha: float | None = option(None, "Scale of LoRA; none for twice its rank.", above=0)
    control: bool = option(False, "Train the control: everything alike, but nothing is retrieved.")
    log_every: int = option(10, "Steps between two lines of loss and health.", low=1)
    save_every: int = option(100, "Steps between two checkpoints; 0 for the last one only.", low=0)
    keep_checkpoints: int = option(2, "Checkpoints that are kept.", low=1)
    eval_every: int = option(0, "Steps between two held-out losses; 0 for the end only.", low=0)
    patience: int = option(
        0, "Stop after so many held-out losses without a new best one; 0 for never.", low=0
    )
    report_to: tuple[str, ...] = option(
        (), "Where loss and health go as well: tensorboard, wandb, … (any reporter of the Trainer)."
    )
    eval_blocks: int = option(8, "Held-out sequences that are measured.", low=1)
    resume: bool = option(False, "Go on from the last checkpoint in the output folder.")

    def __post_init__(self) -> None:
        if isinstance(self.data, Mapping):
            self.data = _data(self.data)
        elif not isinstance(self.data, DataConfig):
            self.data = DataConfig(sources=self.data)
        if isinstance(self.rosa, Mapping):
            # Fields that are not given keep the defaults of a run, not those of a bare attach.
            self.rosa = RosaConfig.from_dict({**_default_rosa().to_dict(), **self.rosa})
        check_fields(self)
        if self.base_from is not None and self.lora_rank:
            raise InvalidInputError(
                "base_from trains the base model itself, lora_rank stands in for that; set one"
            )
        if self.patience and not self.eval_every:
            raise InvalidInputError("patience counts held-out losses; set eval_every as well")
        if self.data.streaming and self.steps is None and self.tokens is None:
            raise InvalidInputError(
                "streamed data has no known length; say how long to train with tokens or steps"
            )
        if self.steps is not None and self.tokens is not None:
            raise InvalidInputError("give steps or tokens, not both")
        if self.estimator_schedules:
            if self.rosa is None or not self.rosa.adapters:
                raise InvalidInputError(
                    "estimator_schedules move options of the adapters; set adapters, or leave "
                    "the schedules out"
                )
            read_schedules(self.rosa.estimator, self.estimator_schedules)
        trains = self.rosa is not None and (self.rosa.adapters or self.rosa.token_route)
        if not trains and self.lora_rank == 0:
            raise InvalidInputError(
                "nothing to train: set adapters, token_route, or a lora_rank above 0"
            )

        self._check_address_loss()

    def _check_address_loss(self) -> None:
        rosa = self.rosa
        if self.address_loss == "none":
            if rosa is not None and rosa.adapters and rosa.select and not rosa.select_credit:
                raise InvalidInputError(
                    "select_credit=False leaves a learned choice to an address loss and there is "
                    "none; set address_loss='next_token' or 'surplus', or select_credit=True"
                )
            return
        if rosa is None or not rosa.adapters or not (rosa.learns_address or rosa.select):
            raise InvalidInputError(
                f"address_loss={self.address_loss!r} teaches learned addresses; set adapters, and "
                "address='learned', hash_refine or select"
            )
        if self.address_loss == "teacher" and rosa.select:
            raise InvalidInputError(
                "a learned choice among exact matches is taught by the tokens that follow; use "
                "address_loss='next_token' or 'surplus'"
            )
        if self.address_loss == "surplus" and not rosa.select:
            raise InvalidInputError(
                "address_loss='surplus' teaches a learned choice among exact matches; set select, "
                "or use address_loss='next_token'"
            )
        if self.address_loss == "teacher" and rosa.window is None:
            raise InvalidInputError(
                "address_loss='teacher' shows what lies beyond the window; set a window, or use "
                "address_loss='next_token'"
            )

    def attached(self) -> RosaConfig | None:
        """What is attached to the model: `rosa`, without retrieval for the control."""
        if self.rosa is None or not self.control:
            return self.rosa
        return dataclasses.replace(self.rosa, retrieve=False)

    def total_steps(self, blocks: int, processes: int = 1) -> int:
        """Optimizer steps, given the number of blocks of one pass over the data."""
        if self.steps is not None:
            return self.steps
        a_step = self.batch_size * self.accumulate * processes
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
        """The inverse of `to_dict`; missing fields keep their defaults.

        Raises:
            InvalidInputError: an unknown field (the message names the nearest one).
        """
        check_names(cls, values, "the configuration")
        return cls(**values)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file with the fields of a `TuneConfig`, without checking them.

    Raises:
        InvalidInputError: no such file, or one that holds no mapping.
    """
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text; convert it (iconv -t utf-8)") from error
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


def _data(values: Mapping[str, Any]) -> DataConfig:
    check_names(DataConfig, values, "data")
    return DataConfig(**values)
