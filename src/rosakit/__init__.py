"""rosakit: long-range memory for windowed language models.

Importing the package loads torch and numpy only; everything that needs transformers, peft or a
GPU toolchain is imported when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rosakit import errors, ops
from rosakit.errors import RosakitError

if TYPE_CHECKING:
    from rosakit.tuning import (
        RosaConfig,
        RosaPeftConfig,
        attach,
        detach,
        load_adapter,
        save_adapter,
    )

__version__ = "0.1.0"

__all__ = [
    "RosaConfig",
    "RosaPeftConfig",
    "RosakitError",
    "__version__",
    "attach",
    "detach",
    "errors",
    "load_adapter",
    "ops",
    "save_adapter",
]

_LAZY = dict.fromkeys(
    ("RosaConfig", "RosaPeftConfig", "attach", "detach", "load_adapter", "save_adapter"),
    "rosakit.tuning",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rosakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
