"""Blocks of source code from packages that are installed anyway.

Every block is the beginning or a later part of one file, so that a position's number says how much
of its own file precedes it. Whole files are held out, chosen by a hash of their names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import torch

BLOCKS_A_FILE = 6
HELD_OUT = 12  # one file in so many


def source_files(packages: list[str]) -> list[tuple[str, Path]]:
    """Python files of the standard library and of packages, in an order that names alone decide."""
    roots = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            roots.append((name, Path(spec.origin).parent))
    found = []
    for name, root in roots:
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if "site-packages" not in relative.parts and path.stat().st_size >= 12_000:
                found.append((f"{name}/{relative.as_posix()}", path))
    return sorted(found, key=lambda item: _number(item[0]))


def is_held_out(name: str) -> bool:
    return _number(name) % HELD_OUT == 0


def blocks_of_code(
    tokenizer: Any, *, length: int, train: int, heldout: int, packages: list[str]
) -> dict[str, Any]:
    """Token blocks ``train [N, T]`` and ``heldout [M, T]``, and the names of the files used."""
    wanted = {"train": train, "heldout": heldout}
    rows: dict[str, list[torch.Tensor]] = {"train": [], "heldout": []}
    names: dict[str, list[str]] = {"train": [], "heldout": []}
    pending: list[tuple[str, str, str]] = []

    def take() -> None:
        ids = tokenizer([text for _, _, text in pending], verbose=False)["input_ids"]
        for (part, name, _), row in zip(pending, ids, strict=True):
            blocks = torch.tensor(row[: len(row) // length * length]).view(-1, length)
            room = min(BLOCKS_A_FILE, wanted[part] - len(rows[part]))
            if len(blocks) and room > 0:
                rows[part].extend(blocks[:room])
                names[part].append(name)
        pending.clear()

    for name, path in source_files(packages):
        part = "heldout" if is_held_out(name) else "train"
        if len(rows[part]) >= wanted[part]:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        pending.append((part, name, text[: 6 * length * BLOCKS_A_FILE]))
        if len(pending) >= 64:
            take()
            if all(len(rows[p]) >= wanted[p] for p in wanted):
                break
    if pending:
        take()
    if not rows["train"] or not rows["heldout"]:
        raise SystemExit(f"no file of {length} tokens found; install larger packages")
    return {part: torch.stack(rows[part]).to(torch.int32) for part in rows} | {"files": names}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
