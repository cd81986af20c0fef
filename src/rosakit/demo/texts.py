"""The demo's texts: the interpreter's own standard library, and plays."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import DataError
from rosakit.tuning.data import Document

__all__ = ["Split", "plays", "split", "standard_library"]

_SKIPPED = frozenset(
    # Installed packages, tests, tables of characters, and generated or absent parts.
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "ensurepip",
        "__pycache__",
    ]
)


@dataclass(frozen=True)
class Split:
    """Texts of one kind: each a first stretch of a file, as token ids.

    Attributes:
        train, heldout: int64 ``[T]``.
        train_names, heldout_names: of the files, in the same order.
        heldout_text: all of the held-out files' text.
    """

    train: list[Tensor]
    heldout: list[Tensor]
    train_names: list[str]
    heldout_names: list[str]
    heldout_text: str


def standard_library(folder: Path | None = None) -> list[Document]:
    """Source files of the standard library of this interpreter (PSF licence)."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = [
        path
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    return _read(root, paths)


def plays(folder: Path) -> list[Document]:
    """Plays, each from its first act on (before it stands a list of persons)."""
    found = []
    for document in _read(folder, folder.glob("*.txt")):
        start = document.text.upper().find("\nACT I")
        if start > 0:
            found.append(Document(document.name, document.text[start:].lstrip()))
    return found


def _read(root: Path, paths: Iterable[Path]) -> list[Document]:
    documents = []
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        documents.append(Document(path.relative_to(root).as_posix(), text.replace("\r\n", "\n")))
    return documents


def split(
    documents: Sequence[Document], tokenizer: Any, *, length: int, heldout: int, train: int
) -> Split:
    """The first `length` tokens of files that are long enough, held out or for training.

    Which is which follows from a hash of the file's name, not from a choice. A text that occurs
    twice is used once.

    Raises:
        DataError: too few files of that length.
    """

    def place(document: Document) -> str:
        return hashlib.sha256(document.name.encode()).hexdigest()

    chosen: list[tuple[Document, Tensor]] = []
    seen: set[str] = set()
    for document in sorted(documents, key=place):
        # Fewer characters than tokens cannot be; and nothing past the cut has to be tokenised.
        if len(document.text) < length or document.text in seen:
            continue
        seen.add(document.text)
        ids = tokenizer(document.text[: 16 * length], add_special_tokens=False).input_ids
        if len(ids) >= length:
            chosen.append((document, torch.tensor(ids[:length])))
        if len(chosen) == heldout + train:
            break
    if len(chosen) < heldout + train:
        raise DataError(
            f"the demo needs {heldout + train} texts of {length} tokens and found {len(chosen)} of "
            f"{len(documents)}; ask for fewer or shorter ones"
        )
    held, kept = chosen[:heldout], chosen[heldout:]
    return Split(
        [ids for _, ids in kept],
        [ids for _, ids in held],
        [document.name for document, _ in kept],
        [document.name for document, _ in held],
        "\n\n".join(document.text for document, _ in held),
    )
