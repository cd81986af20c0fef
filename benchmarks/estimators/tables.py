"""A part's rows as a table for people: mean and range over the seeds."""

from __future__ import annotations

from typing import Any

from benchmarks.estimators.results import grouped, spread


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    return _TABLES[name](rows)


def _lines(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _range(values: list[float], digits: int = 1, scale: float = 100.0) -> str:
    mean, low, high, _ = spread(scale * v for v in values)
    if round(low, digits) == round(high, digits):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


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
    keys = ("task.pairs", "task.length", "task.vocabulary", "task.random_filler", "tied_start")
    columns = list(grouped(rows, *keys))
    cells = grouped(rows, "variant", *keys)
    names = list(dict.fromkeys(r["variant"] for r in rows))
    head = ["variant"] + [
        f"{pairs} pairs, T = {length}, {vocabulary} tokens"
        + (", random filler" if filler else "")
        + ("" if tied else ", untied start")
        for pairs, length, vocabulary, filler, tied in columns
    ]
    body = [
        [f"`{name}`"]
        + [
            _range([r["accuracy"] for r in cells[name, *c]]) if (name, *c) in cells else "–"
            for c in columns
        ]
        for name in names
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


def _cost(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in (r for r in rows if "error" not in r):
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        size = [f"`{row['variant']}`", str(row["length"]), str(row["routes"])]
        body.append([*size, f"{row['milliseconds']:.2f}", peak])
    return _lines(["variant", "T", "routes", "ms", "peak MiB"], body)


_TABLES = {
    "fit": _fit,
    "mqar": _recall,
    "synonyms": _recall,
    "count": _count,
    "agree": _agree,
    "cost": _cost,
}
