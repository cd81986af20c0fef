"""Hugging Face models with rosakit: configuration, attach and detach, windows, checkpoints."""

from __future__ import annotations

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

__all__ = [
    "RosaConfig",
    "adapters_of",
    "attach",
    "config_of",
    "detach",
    "freeze_base",
    "is_attached",
    "load_adapter",
    "record_matches",
    "rosa_parameters",
    "save_adapter",
]
