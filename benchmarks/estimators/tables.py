"""A part's rows as a table for people: mean (least–largest; number of seeds)."""

from __future__ import annotations

from typing import Any

from benchmarks.estimators.results import grouped, spread
from benchmarks.estimators.variants import VARIANTS


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown, variants in the order in which they are defined."""
    order = list(VARIANTS)
    return _TABLES[name](sorted(rows, key=lambda row: order.index(row["variant"])))


def _lines(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _range(values: list[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean, least and largest where they differ, and the number of seeds."""
    mean, low, high, seeds = spread(scale * v for v in values)
    spans = f"{low:.{digits}f}–{high:.{digits}f}; "
    if round(low, digits) == round(high, digits):
        spans = ""
    return f"{mean:.{digits}f} ({spans}{seeds})"


def best_rates(rows: list[dict[str, Any]]) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """For every variant its best rate by mean accuracy, and the rows of that rate."""
    found: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    for (variant, rate), some in grouped(rows, "variant", "rate").items():
        mean = spread(r["accuracy"] for r in some)[0]
        if variant not in found or mean > spread(r["accuracy"] for r in found[variant][1])[0]:
            found[variant] = rate, some
    return found


def _fit(rows: list[dict[str, Any]]) -> str:
    body = [
        [f"`{variant}`", _range([r["accuracy"] for r in some]), f"{rate:g}"]
        for variant, (rate, some) in best_rates(rows).items()
    ]
    return _lines(["variant", "bits right, %", "its best rate"], body)


def _recall(rows: list[dict[str, Any]]) -> str:
    """A table for each start and filler, variants down and sizes across.

    Where only some variants were trained at some sizes, a second table has those, all sizes down.
    """
    keys = ("task.random_filler", "tied_start")
    written = []
    groups = grouped(rows, *keys)
    for filler, tied in sorted(groups, key=lambda group: (group[0], not group[1])):
        start = "tied start" if tied else "untied start"
        between = "random tokens" if filler else "token 0"
        title = f"{start}, {between} between the questions"
        some = groups[filler, tied]
        names = [n for n in VARIANTS if any(r["variant"] == n for r in some)]
        sizes = grouped(some, *_SIZE)
        common = [c for c in sizes if 2 * _count_of(sizes[c]) > len(names)]
        common = sorted(common or sizes, reverse=True)
        written.append(f"{title}:\n\n{_sizes_across(some, names, common)}")
        if len(common) < len(sizes):
            swept = [n for n in names if any(_has(sizes[c], n) for c in sizes if c not in common)]
            written.append(f"{title}, all sizes:\n\n{_sizes_down(some, swept)}")
    return "\n\n".join(written)


_SIZE = ("task.pairs", "task.length", "task.vocabulary", "steps")


def _count_of(rows: list[dict[str, Any]]) -> int:
    return len({r["variant"] for r in rows})


def _has(rows: list[dict[str, Any]], variant: str) -> bool:
    return any(r["variant"] == variant for r in rows)


def _right(cells: dict[tuple[Any, ...], list[dict[str, Any]]], *key: Any) -> str:
    return _range([r["accuracy"] for r in cells[key]]) if key in cells else "–"


def _sizes_across(
    rows: list[dict[str, Any]], names: list[str], columns: list[tuple[Any, ...]]
) -> str:
    cells = grouped(rows, "variant", *_SIZE)
    head = ["right, %"] + [
        f"{pairs} pairs, T = {length}, {vocabulary} tokens, {steps} steps"
        for pairs, length, vocabulary, steps in columns
    ]
    body = [[f"`{n}`", *(_right(cells, n, *c) for c in columns)] for n in names]
    return _lines(head, body)


def _sizes_down(rows: list[dict[str, Any]], names: list[str]) -> str:
    cells = grouped(rows, "variant", *_SIZE)
    head = ["pairs", "T", "tokens", "steps", *(f"`{n}`" for n in names)]
    body = [
        [*map(str, size), *(_right(cells, n, *size) for n in names)]
        for size in sorted(grouped(rows, *_SIZE), reverse=True)
    ]
    return _lines(head, body)


def _count(rows: list[dict[str, Any]]) -> str:
    body = [
        [
            f"`{variant}`",
            _range([r["loss"] for r in some], 3, 1.0),
            _range([r["held_out_loss"] for r in some], 3, 1.0),
            _range([r["seconds"] for r in some], 0, 1.0),
        ]
        for (variant,), some in grouped(rows, "variant").items()
    ]
    return _lines(["variant", "loss of the last 50 steps", "held out", "seconds"], body)


def _agree(rows: list[dict[str, Any]]) -> str:
    body = [
        [f"`{variant}`", stream, str(length)]
        + [_range([r[f"cosine_{x}"] for r in some], 2, 1.0) for x in "qkv"]
        for (variant, stream, length), some in grouped(rows, "variant", "stream", "length").items()
    ]
    return _lines(["variant", "streams", "T", "q", "k", "v"], body)


_TABLES = {
    "fit": _fit,
    "mqar": _recall,
    "synonyms": _recall,
    "count": _count,
    "agree": _agree,
}
