"""Token ids of source code and books: training blocks and held-out texts.

Source code is the standard library and installed packages of this interpreter; books are text
files of a folder. Held out are whole files, by the hash of their text.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rosakit.demo.texts import standard_library
from rosakit.tuning.data import Document

__all__ = ["load", "prepare"]

PACKAGES = ("torch", "transformers")


def prepare(
    tokenizer: Any,
    folder: Path,
    *,
    books: Path | None,
    length: int,
    block: int,
    tokens: int,
    heldout: int,
) -> None:
    """Write ``code.npz`` and ``books.npz`` into a folder.

    Args:
        tokenizer: a Hugging Face tokenizer.
        folder: where the files go.
        books: folder of ``.txt`` files, or None for code alone.
        length: tokens of a held-out text.
        block: tokens of a training block.
        tokens: training tokens a kind at least, as far as there are any.
        heldout: held-out texts a kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"code": _shuffled(_code())}
    if books is not None:
        files = sorted(books.glob("*.txt"))
        kinds["books"] = _shuffled(
            Document(f.name, f.read_text(encoding="utf-8", errors="replace")) for f in files
        )
    names: dict[str, Any] = {}
    for kind, documents in kinds.items():
        train, held, used = _split(documents, tokenizer, kind, length, block, tokens, heldout)
        np.savez(folder / f"{kind}.npz", train=np.stack(train), heldout=np.stack(held))
        names[kind] = {"heldout": used, "train_tokens": len(train) * block}
    (folder / "names.json").write_text(json.dumps(names, indent=1))


def load(folder: Path) -> dict[str, tuple[Any, Any]]:
    """``(training blocks [n, block], held-out texts [m, length])`` by kind of text.

    Files may be packed further: ``code.npz.xz``.
    """
    out = {}
    for kind in ("code", "books"):
        packed = folder / f"{kind}.npz.xz"
        if packed.exists():
            with lzma.open(packed) as file, np.load(io.BytesIO(file.read())) as found:
                out[kind] = (found["train"], found["heldout"])
        elif (folder / f"{kind}.npz").exists():
            with np.load(folder / f"{kind}.npz") as found:
                out[kind] = (found["train"], found["heldout"])
    return out


def _code() -> Iterator[Document]:
    yield from standard_library()
    site = Path(sysconfig.get_paths()["purelib"])
    for package in PACKAGES:
        for path in sorted((site / package).rglob("*.py")):
            try:
                yield Document(path.relative_to(site).as_posix(), path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue


def _shuffled(documents: Iterator[Document] | Sequence[Document]) -> list[Document]:
    """One document for each text, in an order that follows from a seed and the names alone."""
    known = {d.text: d for d in documents}
    out = sorted(known.values(), key=lambda d: d.name)
    random.Random(0).shuffle(out)
    return out


def _split(
    documents: Sequence[Document],
    tokenizer: Any,
    kind: str,
    length: int,
    block: int,
    tokens: int,
    heldout: int,
) -> tuple[list[Any], list[Any], list[str]]:
    share = 0.06 if kind == "code" else 0.2  # there are few books, and many files
    pieces = 1 if kind == "code" else 6
    train: list[Any] = []
    held: list[Any] = []
    names: list[str] = []
    for document in documents:
        if len(document.text) < 2 * block:
            continue
        digest = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
        keep = int.from_bytes(digest[:8], "big") / 2**64 >= share
        enough = len(train) * block >= tokens
        if (enough and keep) or (len(held) >= heldout and not keep):
            if enough and len(held) >= heldout:
                break
            continue
        ids = np.array(tokenizer(document.text, verbose=False)["input_ids"], dtype=np.int32)
        if keep:
            train += [ids[b : b + block] for b in range(0, len(ids) - block + 1, block)]
            continue
        # Pieces spread over a book, each a text of its own.
        room = len(ids) // length
        for n in range(min(pieces, room)):
            begin = (n * room // min(pieces, room)) * length
            if len(held) < heldout:
                held.append(ids[begin : begin + length])
                names.append(f"{document.name}:{begin}")
    return train, held, names
