"""The folder that a training run leaves: what was trained, how, and on which base model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import CheckpointError, InvalidInputError, InvalidTypeError
from rosakit.files import atomic_write
from rosakit.tuning.attach import freeze_base, is_attached, rosa_parameters
from rosakit.tuning.base import Whole, base_parameters, load_base, save_base
from rosakit.tuning.checkpoint import CONFIG_FILE, fingerprint, load_adapter, save_adapter
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.lora import SETTINGS_FILE, load_lora, lora_parameters, save_lora
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.sources import load_model

__all__ = [
    "load_any",
    "load_result",
    "load_trained",
    "located",
    "read_run",
    "save_trained",
    "set_trainable",
]

RUN_FILE = "tune.json"
"""The run's `TuneConfig`, which names the base model."""


def set_trainable(model: Any, *, base: bool = False) -> None:
    """Leave exactly what is stored trainable: adapters, token route, LoRA; all with `base`."""
    if base:
        model.requires_grad_(True)
        return
    if is_attached(model):
        freeze_base(model)
    else:
        model.requires_grad_(False)
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(True)


def save_trained(
    model: Any,
    folder: Path,
    config: TuneConfig,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    base_model: Mapping[str, Any] | None = None,
) -> None:
    """Write the trained parameters of a model, and the run's configuration, into a folder.

    Args:
        model: the model.
        folder: made if needed.
        config: the run.
        tensors: full tensors by qualified name, where the model's own are sharded; None to read
            the model.
        base_model: the base's `fingerprint`, where its weights are sharded; None to compute it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = Whole(model, tensors)
    if is_attached(model):
        parts = None if tensors is None else whole.of(rosa_parameters(model))
        save_adapter(model, folder, tensors=parts, base_model=base_model)
    if config.lora_rank:
        save_lora(
            whole.of(lora_parameters(model)),
            folder,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            base_model=fingerprint(model) if base_model is None else base_model,
        )
    if config.base_from is not None:
        save_base(whole.of(base_parameters(model)), folder)
    atomic_write(folder / RUN_FILE, json.dumps(located(config), indent=2) + "\n")


def located(config: TuneConfig) -> dict[str, Any]:
    """The fields of a run with local names made absolute.

    A result must find its base model, its texts and its folder from any working directory.
    """
    values = config.to_dict()
    values["model"] = _absolute(values["model"])
    values["output"] = str(Path(values["output"]).expanduser().absolute())
    for name in ("sources", "heldout"):
        values["data"][name] = [_absolute(source) for source in values["data"][name]]
    return values


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.exists() else name


def load_trained(
    model: Any, folder: Path, config: TuneConfig | None = None, *, any_base: bool = False
) -> None:
    """Put the trained parameters of a folder into a base model, attaching what it lacks.

    Args:
        model: the base model, plain or with what is to be loaded.
        folder: a result or a checkpoint.
        config: the run, which says what the folder must hold; None to read it there.
        any_base: see `rosakit.tuning.checkpoint.load_adapter`.

    Raises:
        CheckpointError: a part of the run is missing, left over or corrupt, or of another model.
    """
    if config is None:
        config = read_run(folder)
    parts = (
        (CONFIG_FILE, config.attached() is not None, "adapters and token route"),
        (SETTINGS_FILE, config.lora_rank > 0, "LoRA"),
    )
    for file, expected, what in parts:
        found = (folder / file).exists()
        if found != expected:
            raise CheckpointError(
                f"{folder} {'holds' if found else 'lacks'} {file}, but its run was "
                f"{'without' if found else 'with'} {what}; the checkpoint is incomplete or mixed "
                "with another one, restore it from a copy or train again"
            )
    if config.base_from is not None:
        load_base(base_parameters(model), folder)
    if config.lora_rank:
        load_lora(model, folder, any_base=any_base)
    if config.attached() is not None:
        load_adapter(model, folder, any_base=any_base)


def read_run(folder: str | os.PathLike[str]) -> TuneConfig:
    """The configuration of the run that wrote a folder.

    Raises:
        CheckpointError: no result of `rosakit tune`, or a corrupt one.
    """
    path = Path(folder) / RUN_FILE
    if not Path(folder).is_dir():
        raise CheckpointError(f"no such folder: {folder}; give the output folder of rosakit tune")
    if not path.is_file():
        raise CheckpointError(f"{folder} is no result of rosakit tune: it has no {RUN_FILE}")
    try:
        values = json.loads(path.read_text())
        if isinstance(values.get("rosa"), dict):
            values["rosa"] = RosaConfig.from_saved(values["rosa"])
        return TuneConfig.from_dict(values)
    except (
        AttributeError,
        ValueError,
        OSError,
        TypeError,
        InvalidInputError,
        InvalidTypeError,
    ) as error:
        raise CheckpointError(f"{path} is corrupt: {error}; train again or restore it") from error


def load_result(
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    any_base: bool = False,
) -> tuple[Any, Any, TuneConfig]:
    """Load a trained model: its base model, and what the run added to it.

    Args:
        folder: the output folder of a run, or one of its checkpoints.
        base: base model to use instead of the one that the run names (moved, renamed).
        dtype: "float32", "bfloat16" or "auto"; None for the run's own.
        device: "cpu", "cuda", … or "auto"; None for the run's own.
        any_base: see `rosakit.tuning.checkpoint.load_adapter`.

    Returns:
        ``(model, tokenizer, the run's configuration)``.

    Raises:
        CheckpointError: no result, or a corrupt one; never a model with parts left untrained.
        InvalidInputError: the base model cannot be found.
    """
    config = read_run(folder)
    try:
        model, tokenizer = load_model(
            config.model if base is None else base,
            gguf_file=config.gguf_file if base is None else None,
            dtype=config.dtype if dtype is None else dtype,
            device=config.device if device is None else device,
        )
    except InvalidInputError as error:
        if base is not None or Path(config.model).exists():
            raise
        raise InvalidInputError(
            f"{error} ({folder} names it as its base model; say where it is now with base)"
        ) from error
    load_trained(model, Path(folder), config, any_base=any_base)
    return model.eval(), tokenizer, config


def load_any(
    name: str,
    *,
    base: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a training result, a saved adapter, or a plain model.

    Args:
        name: output folder of a run, folder of `rosakit.save_adapter`, or whatever
            `rosakit.tuning.sources.load_model` takes.
        base: base model of a result, if it has moved; of an adapter, always.
        dtype: "float32", "bfloat16" or "auto".
        device: "cpu", "cuda", … or "auto".

    Raises:
        InvalidInputError: an adapter without its base model, or a model that cannot be found.
        CheckpointError: a corrupt result or adapter, or one of another model.
    """
    if (Path(name) / RUN_FILE).is_file():
        model, tokenizer, _ = load_result(name, base=base, dtype=dtype, device=device)
        return model, tokenizer
    if (Path(name) / CONFIG_FILE).is_file():
        if base is None:
            raise InvalidInputError(
                f"{name} holds an adapter alone, which does not know where its base model is; "
                "name that with --base (base=...)"
            )
        model, tokenizer = load_model(base, dtype=dtype, device=device)
        return load_adapter(model, name).eval(), tokenizer
    if base is not None:
        raise InvalidInputError(
            f"{name} is neither a result of rosakit tune nor a saved adapter, so base {base} has "
            "no meaning; leave it out"
        )
    return load_model(name, dtype=dtype, device=device)
