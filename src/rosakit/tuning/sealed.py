"""Folders of checkpoints: complete or not there, and only resumed by the run that wrote them.

A checkpoint is written into a staging folder, sealed with the SHA-256 of each of its files, and
renamed into place: a folder named ``checkpoint-N`` is complete, whenever the process died.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rosakit.errors import CheckpointError
from rosakit.files import atomic_write, sync
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.settings import TuneConfig

__all__ = ["FREE", "LOSSES", "checkpoints", "last_checkpoint", "seal", "verify_checkpoint"]

FREE = (
    "resume",
    "output",
    "device",
    "keep_checkpoints",
    "save_every",
    "eval_every",
    "report_to",
)
"""Settings that may change between a run and its continuation."""

_SEAL, LOSSES = "seal.json", "losses.json"


def last_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(Path(output) / "checkpoints")
    return found[-1][1] if found else None


def verify_checkpoint(folder: Path, identity: dict[str, Any] | None = None) -> None:
    """Check a checkpoint's files, and that it belongs to the run that wants to go on.

    Args:
        folder: a folder ``checkpoint-N``.
        identity: configuration and data digest of the run; None leaves that out.

    Raises:
        CheckpointError: incomplete, corrupt, or of another run.
    """
    remedy = "delete it to go on from the one before, or start again without resume"
    try:
        sealed = json.loads((folder / _SEAL).read_text())
        for name, digest in sealed.items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is corrupt; {remedy}")
        saved = _completed(json.loads((folder / LOSSES).read_text())["identity"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is incomplete or corrupt ({error}); {remedy}") from error
    if identity is not None and saved != identity:
        names = sorted(n for n in {*saved, *identity} if saved.get(n) != identity.get(n))
        raise CheckpointError(
            f"{folder} belongs to a run with other {', '.join(names)}; resume with the same "
            "configuration and data, or train into another output folder"
        )


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints by step, oldest first."""
    found = []
    for path in root.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return sorted(found)


def seal(folder: Path) -> None:
    """Write all files through to the disk and record their digests."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = _digest(path)
            sync(path)
    atomic_write(folder / _SEAL, json.dumps(digests, indent=1) + "\n")
    sync(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _completed(identity: dict[str, Any]) -> dict[str, Any]:
    """A stored identity with the fields that have come since, as they were before they came."""
    if "data" not in identity:
        return identity
    defaults = {**json.loads(json.dumps(TuneConfig().to_dict())), "processes": 1}
    rosa = identity.get("rosa")
    if isinstance(rosa, dict):
        rosa = RosaConfig.from_saved(rosa).to_dict()
    found = {**defaults, **identity, "rosa": rosa}
    found["data"] = {**defaults["data"], **identity["data"]}
    for name in FREE:
        found.pop(name, None)
    return found
