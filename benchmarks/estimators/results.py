"""The results file: one part after another, each with what it was measured on."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rosakit.evaluate.environment import describe_environment
from rosakit.files import atomic_write


def read(path: Path) -> dict[str, Any]:
    """The file's content, or no parts."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    return found


def write_part(
    path: Path, name: str, command: str, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Replace one part and keep the others."""
    part = {
        "command": command,
        "environment": dataclasses.asdict(describe_environment()),
        "settings": settings,
        "rows": rows,
    }
    _write(path, {**read(path)["parts"], name: part})


def merge(path: Path, files: Iterable[Path]) -> None:
    """Take the parts of other files, each replacing the part of its name."""
    parts = read(path)["parts"]
    for file in files:
        parts |= read(file)["parts"]
    _write(path, parts)


def _write(path: Path, parts: dict[str, Any]) -> None:
    body = ",\n".join(f" {json.dumps(part)}: " + _part(values) for part, values in parts.items())
    atomic_write(path, '{"parts": {\n' + body + "\n}}\n")


def _part(values: dict[str, Any]) -> str:
    """A line a row, so that differences between versions can be read."""
    head = ",\n  ".join(f'"{k}": {json.dumps(v)}' for k, v in values.items() if k != "rows")
    rows = ",\n   ".join(json.dumps(row) for row in values["rows"])
    return "{\n  " + head + ',\n  "rows": [\n   ' + rows + "\n  ]}"


def spread(values: Iterable[float]) -> tuple[float, float, float, int]:
    """Mean, least, largest and number."""
    found = list(values)
    return statistics.fmean(found), min(found), max(found), len(found)


def grouped(
    rows: Iterable[dict[str, Any]], *keys: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows without errors by the values of `keys` (dotted for nested ones), in order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(tuple(_value(row, key) for key in keys), []).append(row)
    return found


def _value(row: dict[str, Any], key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = value[part]
    return value
