"""Reading and writing checkpoint files: tensors by their published names, and what is said of them.

Nothing in a checkpoint is ever executed: ``.pth`` is read weights-only, ``.npz`` without pickles.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rosakit.errors import CheckpointError
from rosakit.files import atomic_write

WEIGHTS = "model.safetensors"
"""Name of the weights in the folder that training writes."""

_BITS_IN_NAME = re.compile(r"(?<!\d)([14])[-_ ]?bits?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        path: where it was read from.
        tensors: floating point tensors by name.
        metadata: what the file says of itself (safetensors only).
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def named_bits(self) -> int | None:
        """Bits a route as the file's name says ("rosa_4bit"), None if it does not."""
        found = {int(n) for n in _BITS_IN_NAME.findall(self.path.name)}
        return found.pop() if len(found) == 1 else None


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a ``.pth``, ``.npz`` or ``.safetensors`` file, or the folder of a training run.

    Raises:
        CheckpointError: the file is missing, has another format, is damaged, or holds something
            other than finite floating point tensors.
    """
    source = Path(path)
    if source.is_dir():
        source = source / WEIGHTS
    if not source.exists():
        raise CheckpointError(f"no checkpoint at {source}; check the path")
    readers: dict[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]] = {
        ".pth": _read_pth,
        ".pt": _read_pth,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
    }
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise CheckpointError(
            f"{source} is not a checkpoint that can be read: expected .pth, .npz or .safetensors"
        )
    try:
        tensors, metadata = reader(source)
    except CheckpointError:
        raise
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{source} cannot be read as {source.suffix}: {reason}; "
            "the file is damaged, incomplete or of another format, so fetch it again"
        ) from error
    # What torch.compile prefixes when a compiled model is saved.
    tensors = {name.removeprefix("_orig_mod."): x for name, x in tensors.items()}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors")
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise CheckpointError(f"{source}: tensor {name} has dtype {x.dtype}, expected floats")
        if not bool(torch.isfinite(x).all()):
            raise CheckpointError(
                f"{source}: tensor {name} holds NaN or infinity; the file is damaged or training "
                "diverged"
            )
    return Checkpoint(source, tensors, metadata)


def _read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(x, Tensor) for x in loaded.values()):
        raise CheckpointError(
            f"{path} holds no state dict (a mapping of names to tensors) but "
            f"{type(loaded).__name__}; save model.state_dict()"
        )
    return {str(name): x for name, x in loaded.items()}, {}


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with np.load(path, allow_pickle=False) as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(
            f"reading {path} needs safetensors: pip install safetensors"
        ) from None
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def write(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str]) -> Path:
    """Write a model's tensors to ``.safetensors``, atomically.

    Raises:
        CheckpointError: another suffix, safetensors is missing, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"models are saved as .safetensors, got {target.name}")
    try:
        from safetensors.torch import save as serialize
    except ImportError:
        raise CheckpointError(
            f"writing {target} needs safetensors: pip install safetensors"
        ) from None
    tensors = {name: x.detach().contiguous().cpu() for name, x in model.state_dict().items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, serialize(tensors, metadata=metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target
