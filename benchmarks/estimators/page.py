"""Tables of result files written into pages of the docs, between marks that name them.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``; what is around is prose.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.estimators import results
from benchmarks.estimators.tables import table
from rosakit.files import atomic_write

DOCS = Path(__file__).parents[2] / "docs" / "estimators"
COMPARISON = DOCS / "comparison.md"


def tables(path: Path) -> dict[str, str]:
    """The table of every part of the comparison's results."""
    return {name: table(name, part["rows"]) for name, part in results.read(path)["parts"].items()}


def write(page: Path, found: dict[str, str]) -> None:
    """Replace the tables of a page.

    Raises:
        ValueError: the page has no place for one of them.
    """
    text = page.read_text(encoding="utf-8")
    for name, body in found.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, mark, rest = text.partition(begin)
        _, closing, after = rest.partition(end)
        if not (mark and closing):
            raise ValueError(f"{page} has no place for {name!r}; put {begin} and {end} there")
        text = f"{before}{begin}\n{body}\n{end}{after}"
    atomic_write(page, text)
