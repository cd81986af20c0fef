"""The results file: one part after another, every row with the run that it was measured in."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rosakit.evaluate.environment import describe_environment
from rosakit.files import atomic_write

KEYS = ("variant", "seed", "rate", "stream", "length", "routes", "task", "tied_start", "steps")
"""What names a row within its part; a row of the same name replaces it."""


def read(path: Path) -> dict[str, Any]:
    """The file's content, or no parts."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    return found


def add(
    path: Path, name: str, command: str, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Put rows of one run into a part: they replace those of the same name and keep the others."""
    run = {
        "command": command,
        "environment": dataclasses.asdict(describe_environment()),
        "settings": settings,
    }
    part = {"runs": [run], "rows": [{**row, "run": 0} for row in rows]}
    parts = read(path)["parts"]
    _write(path, {**parts, name: _joined(parts.get(name), part)})


def merge(path: Path, files: Iterable[Path]) -> None:
    """Take the rows of other files, each replacing the row of its name."""
    parts = read(path)["parts"]
    for file in files:
        for name, part in read(file)["parts"].items():
            parts[name] = _joined(parts.get(name), part)
    _write(path, parts)


def _joined(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Rows of both, the new ones where both have one, and the runs that some row is of."""
    runs: list[dict[str, Any]] = []
    rows: dict[str, dict[str, Any]] = {}
    for part in (old, new):
        for row in part["rows"] if part else ():
            name = json.dumps([row.get(key) for key in KEYS], sort_keys=True)
            if "error" in row and name in rows:
                continue
            rows[name] = {**row, "run": part["runs"][row["run"]]}  # type: ignore[index]
    for row in rows.values():
        if row["run"] not in runs:
            runs.append(row["run"])
        row["run"] = runs.index(row["run"])
    return {"runs": runs, "rows": list(rows.values())}


def _write(path: Path, parts: dict[str, Any]) -> None:
    body = ",\n".join(f" {json.dumps(part)}: " + _part(values) for part, values in parts.items())
    atomic_write(path, '{"parts": {\n' + body + "\n}}\n")


def _part(values: dict[str, Any]) -> str:
    """A line a row, so that differences between versions can be read."""
    runs, rows = (",\n   ".join(map(json.dumps, values[name])) for name in ("runs", "rows"))
    return '{\n  "runs": [\n   ' + runs + '\n  ],\n  "rows": [\n   ' + rows + "\n  ]}"


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
