"""`RosaPeftConfig`: a `RosaConfig` that peft can hold, save and load."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from rosakit.tuning.config import RosaConfig
from rosakit.tuning.fields import check_fields, option
from rosakit.tuning.peft.card import write_card
from rosakit.tuning.peft.registration import METHOD

__all__ = ["RosaPeftConfig"]


@dataclass
class _Beside:
    """Fields that only the peft form has."""

    lora_rank: int = option(
        0, "Rank of LoRA on all linear layers of the base model, beside ROSA; 0 for none.", low=0
    )
    lora_alpha: float | None = option(None, "Scale of LoRA; none for twice its rank.", above=0)
    modules_to_save: tuple[str, ...] | None = option(
        None, "Names of modules of the base model that are trained whole and saved along."
    )
    evaluation: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Results for the model card: name to number, or name to columns."},
    )


@dataclass
class RosaPeftConfig(_Beside, RosaConfig, PeftConfig):
    """The fields of `RosaConfig` for `peft.get_peft_model`, with LoRA beside them on demand.

    ``adapter_config.json`` holds all of it (window, sinks, layers, bits, estimator, …), so that a
    saved adapter brings its window along.

    Raises:
        InvalidInputError: a value out of range, or options that exclude each other.
        InvalidTypeError: a value of the wrong type.
    """

    def __post_init__(self) -> None:
        self.peft_type: Any = METHOD
        self.task_type: Any = TaskType.CAUSAL_LM if self.task_type is None else self.task_type
        PeftConfig.__post_init__(self)
        check_fields(self, _Beside)
        RosaConfig.__post_init__(self)

    @classmethod
    def of(cls, config: RosaConfig, **options: Any) -> RosaPeftConfig:
        """The same additions as a plain `RosaConfig`, for example one that `attach` was given."""
        return cls(**{**config.to_dict(), **options})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and our part of the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self, base=self.base_model_name_or_path)
