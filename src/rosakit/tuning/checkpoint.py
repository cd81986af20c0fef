"""Saving and loading what `attach` added: safetensors beside a JSON description.

A checkpoint is a directory with ``rosa_config.json`` and ``adapter-<digest>.safetensors``, which
the JSON names with its size and SHA-256. Saving writes and syncs the tensors under their new name
first and replaces the JSON last, in one rename: at every moment the directory holds a complete old
or a complete new checkpoint. Loading verifies everything before it changes a single parameter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from rosakit.errors import CheckpointError, InvalidInputError, InvalidTypeError
from rosakit.files import atomic_write, sync
from rosakit.tuning.attach import attach, config_of, detach, is_attached, rosa_parameters
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.modules import decoder_of

FORMAT = "rosakit-adapter"
FORMAT_VERSION = 2
"""Version 1 named projections ``q_proj`` …, had whole matrices only, and scalars without axis."""
CONFIG_FILE = "rosa_config.json"

_FREE = {
    "window",
    "sink_tokens",
    "global_layers",
    "estimator",
    "estimator_options",
    "counterfactual_stride",
    "tied_start",
    "adapter_dtype",
}
"""Options that may differ between a checkpoint and the model it is loaded into: what the loaded
parameters mean does not depend on them."""


_OLD_NAME = re.compile(r"\b(q|k|v|o|own)_proj\.")

_SAMPLED_ROWS = 64
"""Rows of the embedding that go into the digest of the base model."""


def fingerprint(model: Any) -> dict[str, Any]:
    """What a checkpoint remembers of its base model.

    `weights` is a digest of a sample of them, None where they are not at hand (sharded over
    processes, on the meta device).
    """
    config = model.config.get_text_config(decoder=True)
    return {
        "architecture": type(decoder_of(model)).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "weights": _weights_digest(model),
    }


@torch.no_grad()
def _weights_digest(model: Any) -> str | None:
    """SHA-256 of rows of the input embedding and the decoder's final norm, rounded to bfloat16.

    Rounded, because the same model may be loaded in float32 and in bfloat16.
    """
    embedding = model.get_input_embeddings().weight
    final = [
        parameter
        for _, child in sorted(decoder_of(model).named_children())
        for parameter in child.parameters(recurse=False)
        if parameter.dim() == 1
    ]
    if embedding.dim() != 2 or any(type(p.data) is not Tensor or p.is_meta for p in final):
        return None
    if type(embedding.data) is not Tensor or embedding.is_meta:
        return None
    step = max(1, embedding.shape[0] // _SAMPLED_ROWS)
    digest = hashlib.sha256()
    for tensor in (embedding[::step][:_SAMPLED_ROWS], *final):
        rounded = tensor.to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(rounded.cpu().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    base_model: Mapping[str, Any] | None = None,
) -> Path:
    """Save everything that rosakit added to a model.

    Args:
        model: an attached model.
        directory: created if needed; an older checkpoint in it is replaced in one step.
        tensors: full tensors under the names of `rosa_parameters`, where the model's own
            parameters are sharded over processes; None to read them from the model.
        base_model: the base's `fingerprint` from before it was sharded; None to compute it.

    Returns:
        The directory.

    Raises:
        InvalidInputError: the model is not attached, or `tensors` is incomplete.
        CheckpointError: the directory cannot be written (no space, no permission); an older
            checkpoint in it is still whole then.
    """
    config = config_of(model)
    parameters = rosa_parameters(model)
    if tensors is not None and set(tensors) != set(parameters):
        raise InvalidInputError(
            "save_adapter: `tensors` must have exactly the names of rosa_parameters(model); "
            f"differing: {sorted(set(tensors) ^ set(parameters))[:5]}"
        )
    source = parameters if tensors is None else tensors
    data = dump_tensors({name: t.detach().cpu().contiguous() for name, t in source.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"adapter-{digest[:16]}.safetensors"
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": fingerprint(model) if base_model is None else dict(base_model),
        "config": config.to_dict(),
        "tensors": {"file": file, "bytes": len(data), "sha256": digest},
    }
    target = Path(directory)
    known = (target / file).exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        atomic_write(target / file, data)
        atomic_write(target / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
        sync(target)
        for old in target.glob("adapter-*.safetensors"):
            if old.name != file:
                old.unlink()
    except OSError as error:
        if not known:
            with contextlib.suppress(OSError):
                (target / file).unlink()
        raise CheckpointError(
            f"cannot save to {target}: {error.strerror or error}. Free some space or choose "
            "another directory; a checkpoint that was there before is unchanged"
        ) from error
    return target


def load_adapter(model: Any, directory: str | os.PathLike[str], *, any_base: bool = False) -> Any:
    """Load what `save_adapter` wrote, attaching the model first if it is not.

    Nothing of the model changes unless the whole checkpoint is sound.

    Args:
        model: a model of the checkpoint's architecture and sizes; plain, or attached with options
            that agree with the checkpoint's (window, sinks and estimator may differ).
        directory: the checkpoint.
        any_base: load even if the weights of the base model are not those that the checkpoint
            was trained on (architecture and sizes must agree all the same).

    Returns:
        The same model.

    Raises:
        CheckpointError: missing, half-written, corrupt, too new, or of another model or
            configuration; the message names the file and the remedy.
    """
    path = Path(directory)
    description = read_description(path)
    config = _config(path, description)
    check_base(path, description["base_model"], model, any_base=any_base)
    tensors = _read_tensors(path, description)
    if is_attached(model):
        _check_options(path, config, config_of(model))
        _copy(path, tensors, rosa_parameters(model))
        return model
    attach(model, config)
    try:
        _copy(path, tensors, rosa_parameters(model))
    except CheckpointError:
        detach(model)
        raise
    return model


def read_description(path: Path) -> dict[str, Any]:
    """The verified JSON part of a checkpoint.

    Raises:
        CheckpointError: missing, unreadable, foreign or too new.
    """
    file = path / CONFIG_FILE
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the one that save_adapter wrote")
    try:
        text = file.read_bytes().decode()
        values = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing: {path} is not a rosakit checkpoint, or saving it never finished. "
            "Give another directory, or save again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is corrupt ({error}); restore the checkpoint from a copy or save it again"
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is not a rosakit checkpoint (its format is not {FORMAT!r}); give the "
            "directory that save_adapter wrote"
        )
    version = values.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format version {version!r}, this rosakit reads 1 to {FORMAT_VERSION}; "
            "install the version of rosakit that wrote it, or a newer one"
        )
    part = values.get("tensors")
    if not (
        isinstance(part, dict)
        and isinstance(part.get("file"), str)
        and isinstance(part.get("bytes"), int)
        and isinstance(part.get("sha256"), str)
        and isinstance(values.get("base_model"), dict)
        and isinstance(values.get("config"), dict)
    ):
        raise CheckpointError(
            f"{file} lacks a part (config, base_model or tensors); restore the checkpoint from a "
            "copy or save it again"
        )
    return values


def _config(path: Path, description: dict[str, Any]) -> RosaConfig:
    try:
        return RosaConfig.from_saved(description["config"])
    except (InvalidInputError, InvalidTypeError) as error:
        raise CheckpointError(
            f"{path / CONFIG_FILE} holds a configuration that this rosakit refuses: {error}"
        ) from error


def check_base(
    path: Path, expected: Mapping[str, Any], model: Any, *, any_base: bool = False
) -> None:
    """Compare a stored `fingerprint` with a model.

    Raises:
        CheckpointError: another architecture or other sizes; other weights, unless `any_base`.
    """
    found = fingerprint(model)
    here, there = found.pop("weights"), expected.get("weights")
    differing = [name for name in found if expected.get(name) != found[name]]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another model: "
            + ", ".join(
                f"{name} {expected.get(name)!r} there, {found[name]!r} here" for name in differing
            )
            + ". Load the base model that it was trained on"
        )
    if not any_base and None not in (here, there) and here != there:
        raise CheckpointError(
            f"{path} was trained on other weights than this {found['architecture']} has, though "
            "the sizes agree. Load the base model that it was trained on, or pass any_base=True "
            "to load it all the same"
        )


def _check_options(path: Path, saved: RosaConfig, attached: RosaConfig) -> None:
    there, here = saved.to_dict(), attached.to_dict()
    differing = [name for name in there if name not in _FREE and there[name] != here[name]]
    if differing:
        raise CheckpointError(
            f"{path} was trained with other options than the model is attached with: "
            + ", ".join(f"{name}={there[name]!r} there, {here[name]!r} here" for name in differing)
            + ". Detach the model and let load_adapter attach it, or attach with those options"
        )


def _read_tensors(path: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    part = description["tensors"]
    file = path / Path(part["file"]).name
    remedy = "restore the checkpoint from a copy or save it again"
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is missing, though {CONFIG_FILE} names it; {remedy}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    if len(data) != part["bytes"]:
        raise CheckpointError(
            f"{file} has {len(data)} bytes, {part['bytes']} were saved: it is truncated or "
            f"half-written; {remedy}"
        )
    if hashlib.sha256(data).hexdigest() != part["sha256"]:
        raise CheckpointError(f"{file} is corrupt: its SHA-256 is not the saved one; {remedy}")
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}); {remedy}") from error
    if description["format_version"] == 1:
        tensors = {
            _OLD_NAME.sub(r"projections.w_\1.", n): t.reshape(1) if t.dim() == 0 else t
            for n, t in tensors.items()
        }
    return tensors


def _copy(path: Path, tensors: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    missing = sorted(set(parameters) - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    wrong = sorted(
        f"{name} {list(tensors[name].shape)} there, {list(p.shape)} here"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != p.shape
    )
    if missing or extra or wrong:
        found = [
            f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("unknown", extra), ("shapes", wrong))
            if names
        ]
        raise CheckpointError(
            f"the tensors of {path} do not fit the model ({'; '.join(found)}). Attach with the "
            "options that it was saved with, or let load_adapter attach the model"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
