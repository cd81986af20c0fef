"""The base model's own weights, for runs that train them in a second stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rosakit.errors import CheckpointError
from rosakit.files import atomic_write, sync
from rosakit.tuning.attach import controller_of, is_attached
from rosakit.tuning.lora import lora_parameters

__all__ = ["Whole", "base_parameters", "load_base", "save_base"]

FILE, SETTINGS_FILE = "base.safetensors", "base.json"


class Whole:
    """Parameters as whole tensors on the CPU, also where the model holds shards.

    Args:
        model: whose parameters are asked for.
        tensors: full tensors by qualified name; None to read the model.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> None:
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._tensors = tensors

    def of(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given parameters, under the same names."""
        if self._tensors is None:
            return {name: p.detach().cpu() for name, p in named.items()}
        return {name: self._tensors[self._names[id(p)]] for name, p in named.items()}


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The base model's own weights by qualified name, without what was added."""
    added = {id(p) for p in lora_parameters(model).values()}
    if is_attached(model):
        added |= {id(p) for p in controller_of(model).own_parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in added and p.is_floating_point()
    }


def save_base(named: Mapping[str, Tensor], folder: Path) -> None:
    """Write the base's weights and their digest into an existing folder.

    Args:
        named: `base_parameters`, whole.
        folder: where they go.
    """
    path = folder / FILE
    save_file({n: t.contiguous() for n, t in named.items()}, path, metadata={"format": "pt"})
    sync(path)
    values = {"file": FILE, "bytes": path.stat().st_size, "sha256": _digest(path)}
    atomic_write(folder / SETTINGS_FILE, json.dumps(values) + "\n")


def load_base(named: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Put what `save_base` wrote into the base's parameters.

    Args:
        named: `base_parameters`.
        folder: where the weights are.

    Raises:
        CheckpointError: missing, changed or unreadable, or the weights of another model.
    """
    path = folder / FILE
    remedy = "the checkpoint is incomplete or corrupt, use another one"
    try:
        values = json.loads((folder / SETTINGS_FILE).read_text())
        if _digest(path) != values["sha256"]:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the saved one; {remedy}")
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the base's weights in {folder}: {error}") from error
    wrong = sorted(
        name
        for name in {*named, *tensors}
        if name not in named or name not in tensors or named[name].shape != tensors[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path} holds the weights of another model: {', '.join(wrong[:3])} differ; {remedy}"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
