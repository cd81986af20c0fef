"""Adding our name to peft's closed list of methods, the one place that reaches into peft."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["METHOD", "register"]


def _member(name: str) -> PeftType:
    """The member of peft's enumeration, made if it is not there.

    `register_peft_method` refuses names that the enumeration lacks, and an enumeration with members
    cannot be subclassed.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


METHOD = _member("ROSA")
"""Our method's name in peft."""


def register(config: type[Any], model: type[Any]) -> None:
    """Make peft know configuration and tuner; doing so again changes nothing."""
    if METHOD not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=METHOD.value.lower(), config_cls=config, model_cls=model, prefix=model.prefix
        )
