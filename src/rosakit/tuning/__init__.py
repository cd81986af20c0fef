"""Hugging Face models with rosakit: configuration, attach and detach, windows, training.

Names are imported when they are first used, so that configurations (and the command line's help)
do not wait for transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosakit.tuning.attach import (
        adapters_of,
        attach,
        config_of,
        detach,
        freeze_base,
        is_attached,
        record_matches,
        rosa_parameters,
    )
    from rosakit.tuning.checkpoint import load_adapter, save_adapter
    from rosakit.tuning.config import RosaConfig
    from rosakit.tuning.data import DataConfig
    from rosakit.tuning.memory import CacheMemory, cache_memory, plan_memory
    from rosakit.tuning.peft import RosaPeftConfig
    from rosakit.tuning.result import load_result
    from rosakit.tuning.session import Session, load_session, save_session
    from rosakit.tuning.settings import TuneConfig
    from rosakit.tuning.sources import load_model
    from rosakit.tuning.train import TuneResult, tune

__all__ = [
    "CacheMemory",
    "DataConfig",
    "RosaConfig",
    "RosaPeftConfig",
    "Session",
    "TuneConfig",
    "TuneResult",
    "adapters_of",
    "attach",
    "cache_memory",
    "config_of",
    "detach",
    "freeze_base",
    "is_attached",
    "load_adapter",
    "load_model",
    "load_result",
    "load_session",
    "plan_memory",
    "record_matches",
    "rosa_parameters",
    "save_adapter",
    "save_session",
    "tune",
]

_ATTACH = (
    "adapters_of",
    "attach",
    "config_of",
    "detach",
    "freeze_base",
    "is_attached",
    "record_matches",
    "rosa_parameters",
)
_HOME = {
    **dict.fromkeys(_ATTACH, "attach"),
    **dict.fromkeys(("load_adapter", "save_adapter"), "checkpoint"),
    "RosaConfig": "config",
    "RosaPeftConfig": "peft",
    "DataConfig": "data",
    **dict.fromkeys(("CacheMemory", "cache_memory", "plan_memory"), "memory"),
    "load_result": "result",
    **dict.fromkeys(("Session", "load_session", "save_session"), "session"),
    "TuneConfig": "settings",
    "load_model": "sources",
    **dict.fromkeys(("TuneResult", "tune"), "train"),
}


class _Package(ModuleType):
    """Keeps `rosakit.tuning.attach` the function: importing the submodule must not replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
