"""LoRA beside rosakit: peft's layers in the base model, stored next to the adapter.

``lora.json`` names the file of the tensors with its size and SHA-256 and is replaced last, so that
a folder holds complete old or complete new parameters at every moment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from rosakit.errors import CheckpointError
from rosakit.files import atomic_write
from rosakit.tuning.checkpoint import check_base

__all__ = ["add_lora", "load_lora", "lora_parameters", "save_lora"]

SETTINGS_FILE = "lora.json"


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


def save_lora(
    named: Mapping[str, Tensor],
    folder: Path,
    *,
    rank: int,
    alpha: float | None,
    base_model: Mapping[str, Any],
) -> None:
    """Write LoRA's parameters and settings into an existing folder.

    Args:
        named: `lora_parameters`, whole.
        folder: where they go.
        rank, alpha: as `add_lora` was called.
        base_model: the base's `rosakit.tuning.checkpoint.fingerprint`.
    """
    data = dump_tensors(
        {name: p.detach().cpu().contiguous() for name, p in named.items()},
        metadata={"format": "pt"},
    )
    digest = hashlib.sha256(data).hexdigest()
    file = f"lora-{digest[:16]}.safetensors"
    settings = {
        "rank": rank,
        "alpha": alpha,
        "base_model": dict(base_model),
        "tensors": {"file": file, "bytes": len(data), "sha256": digest},
    }
    # Written by Python, whose OSError says what is wrong with the disk.
    atomic_write(folder / file, data)
    atomic_write(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    for old in folder.glob("lora-*.safetensors"):
        if old.name != file:
            old.unlink()


def load_lora(model: nn.Module, folder: Path, *, any_base: bool = False) -> None:
    """Restore what `save_lora` wrote, adding LoRA where the model has none yet.

    Args:
        model: the base model, with or without LoRA.
        folder: where the parameters are.
        any_base: see `rosakit.tuning.checkpoint.load_adapter`.

    Raises:
        CheckpointError: missing, changed or unreadable files, or parameters of another model.
    """
    remedy = "the checkpoint is incomplete or corrupt, use another one"
    settings = folder / SETTINGS_FILE
    try:
        options = json.loads(settings.read_text())
        rank, alpha, part = options["rank"], options["alpha"], options["tensors"]
        file = folder / Path(part["file"]).name
        data = file.read_bytes()
        if len(data) != part["bytes"] or hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise CheckpointError(
                f"{file} is not what {SETTINGS_FILE} describes (size or SHA-256 differ); {remedy}"
            )
        tensors = load_tensors(data)
        base = dict(options["base_model"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read LoRA from {folder} ({type(error).__name__}: {error}); {remedy}"
        ) from error
    check_base(settings, base, model, any_base=any_base)
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
