"""LoRA beside rosakit: peft's layers in the base model, stored next to the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import nn

from rosakit.errors import CheckpointError

__all__ = ["add_lora", "load_lora", "lora_parameters", "save_lora"]

_WEIGHTS, _SETTINGS = "lora.safetensors", "lora.json"


def add_lora(model: Any, rank: int, alpha: float | None = None) -> None:
    """Put LoRA on all linear layers but the output embedding; call before `attach`.

    The update starts at zero, and its parameters are float32 whatever the model's dtype, so that
    small steps are not lost.

    Args:
        model: a transformers model without LoRA.
        rank: rank of the update, at least 1.
        alpha: scale of the update (divided by the rank); None for twice the rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    scale = 2 * rank if alpha is None else alpha
    settings = LoraConfig(r=rank, lora_alpha=scale, target_modules="all-linear")
    inject_adapter_in_model(settings, model)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.float32)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's parameters by qualified name; empty without LoRA."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def save_lora(model: nn.Module, folder: Path, *, rank: int, alpha: float | None) -> None:
    """Write LoRA's parameters and settings into an existing folder; nothing without LoRA."""
    named = lora_parameters(model)
    if not named:
        return
    tensors = {name: p.detach().cpu().contiguous() for name, p in named.items()}
    # Written by Python, whose OSError says what is wrong with the disk.
    (folder / _WEIGHTS).write_bytes(dump_tensors(tensors, metadata={"format": "pt"}))
    (folder / _SETTINGS).write_text(json.dumps({"rank": rank, "alpha": alpha}) + "\n")


def load_lora(model: nn.Module, folder: Path) -> None:
    """Restore what :func:`save_lora` wrote, adding LoRA where the model has none yet.

    Does nothing if the folder holds no LoRA and the model has none.

    Raises:
        CheckpointError: unreadable files, or parameters that do not fit the model.
    """
    weights, settings = folder / _WEIGHTS, folder / _SETTINGS
    if not weights.exists() and not settings.exists():
        if lora_parameters(model):
            raise CheckpointError(f"{folder} holds no {_WEIGHTS}, but the model has LoRA")
        return
    try:
        tensors = load_file(weights)
        options = json.loads(settings.read_text())
        rank, alpha = options["rank"], options["alpha"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read LoRA from {folder} ({error}); the checkpoint is incomplete or corrupt, "
            "use another one"
        ) from error
    if not lora_parameters(model):
        add_lora(model, rank, alpha)
    named = lora_parameters(model)
    if set(named) != set(tensors) or any(named[n].shape != t.shape for n, t in tensors.items()):
        raise CheckpointError(
            f"LoRA in {folder} belongs to another model: its parameters differ in name or shape"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
