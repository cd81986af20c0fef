"""Plots of the comparison: one figure for the tasks, one for directions and cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.estimators.results import grouped, spread
from benchmarks.estimators.tables import best_rates
from benchmarks.estimators.variants import VARIANTS

_COLOURS = {
    "counterfactual": "#1b6ca8",
    "bitflip": "#b3261e",
    "bitflip_inverse": "#7a0f0a",
    "bitflip_sampled": "#e39a94",
    "soft_dp": "#2e7d32",
    "soft_dp_st": "#8bc48d",
    "soft_scan": "#8a5a00",
    "soft_scan_st": "#e0b050",
    "suffix_attention": "#6a3fa0",
    "frozen": "#777777",
    "control": "#aaaaaa",
    "attention": "#222222",
}
# Rows of the cost plot that are no variant of the tasks.
_COSTS = {
    "windowed attention, 2048": "#222222",
    "full attention": "#888888",
    "bitflip_sampled, 256 flips": "#e36a94",
    "suffix_attention, window 32": "#a98bd6",
}


def plot(parts: dict[str, Any], beside: Path) -> list[Path]:
    """Write PNG files beside the results; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    written = []
    order = list(VARIANTS)
    parts = {
        name: {**part, "rows": sorted(part["rows"], key=lambda r: order.index(r["variant"]))}
        for name, part in parts.items()
    }
    tasks = [n for n in ("fit", "mqar", "synonyms", "count") if n in parts]
    if tasks:
        lines, columns = (len(tasks) + 1) // 2, min(2, len(tasks))
        size = (5.2 * columns, 3.9 * lines)
        figure, axes = plt.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes.flat, tasks, strict=False):
            _TASKS[name](axis, parts[name]["rows"])
        for axis in axes.flat[len(tasks) :]:
            axis.set_axis_off()
        written.append(_save(figure, beside, ""))
    costs = beside.with_name(f"{beside.stem}_cost.json")
    others = [n for n in ("agree",) if n in parts] + (["cost"] if costs.exists() else [])
    if others:
        figure, axes = plt.subplots(
            1, len(others), figsize=(6.2 * len(others), 4.2), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], others, strict=True):
            if name == "agree":
                _agree(axis, parts[name]["rows"])
            else:
                _cost(axis, json.loads(costs.read_text())["rows"])
        written.append(_save(figure, beside, "_cost"))
    return written


def _save(figure: Any, beside: Path, suffix: str) -> Path:
    path = beside.with_name(f"{beside.stem}{suffix}.png")
    figure.savefig(path, dpi=130)
    return path


def _bars(axis: Any, values: dict[str, list[float]], title: str, unit: str) -> None:
    """Mean as a bar with its number of seeds, every seed as a dot, a line from least to largest."""
    for place, (name, some) in enumerate(values.items()):
        mean, low, high, seeds = spread(some)
        axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.annotate(f"{seeds}", (0.005, place), xycoords=("axes fraction", "data"), fontsize=6,
                      color="white", va="center")  # fmt: skip
        axis.barh(place, mean, color=_COLOURS[name], height=0.7)
        axis.plot(some, [place] * len(some), "o", color="black", markersize=3)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit)


def _fit(axis: Any, rows: list[dict[str, Any]]) -> None:
    best = best_rates(rows)
    for name, (_, some) in best.items():
        curves = [r["accuracy_per_10_steps"] for r in some]
        mean = [100 * sum(x) / len(x) for x in zip(*curves, strict=True)]
        steps = [10 * (n + 1) for n in range(len(mean))]
        axis.plot(steps, mean, color=_COLOURS[name])
        axis.text(steps[-1] * 1.02, mean[-1], name, color=_COLOURS[name], fontsize=8, va="center")
        axis.set_xlim(0, steps[-1] * 1.35)
    axis.set_title("(a) fitting q and k directly", fontsize=10)
    axis.set_xlabel("step of Adam")
    axis.set_ylabel("output bits right, %")


def _mqar(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [r for r in rows if "error" not in r]
    tasks = [r["task"] for r in rows]
    names = [(r["task"], r["variant"]) for r in rows if r["tied_start"]]
    task = max(tasks, key=lambda t: (len({n for u, n in names if u == t}), t["length"]))
    some = [r for r in rows if r["task"] == task]
    values = {}
    for (name, tied), found in grouped(some, "variant", "tied_start").items():
        if tied:
            values[name] = [100 * r["accuracy"] for r in found]
    filler = ", random filler" if task["random_filler"] else ""
    title = f"(b) MQAR, {task['pairs']} pairs, T = {task['length']}{filler}"
    _bars(axis, values, title, "right, %")
    plain = {**task, "random_filler": False}
    if filler and any(r["task"] == plain for r in rows):
        for place, name in enumerate(values):
            found = [r for r in rows if (r["task"], r["variant"]) == (plain, name)]
            points = [100 * r["accuracy"] for r in found if r["tied_start"]]
            axis.plot(points, [place - 0.2] * len(points), "D", color="#d98000", markersize=4)
        axis.plot([], [], "D", color="#d98000", markersize=4, label="token 0 as filler")
    smallest = min(rows, key=lambda r: r["task"]["length"])["task"]
    untied = grouped([r for r in rows if not r["tied_start"] and r["task"] == smallest], "variant")
    for place, name in enumerate(values):
        if (name,) in untied:
            points = [100 * r["accuracy"] for r in untied[name,]]
            axis.plot(points, [place + 0.2] * len(points), "x", color="red", markersize=5)
    axis.set_xlim(0, 102)
    if untied:
        axis.plot([], [], "x", color="red", label=f"untied start, {smallest['pairs']} pairs")
        axis.plot([], [], "o", color="black", markersize=3, label="seeds")
        axis.legend(fontsize=7, loc="lower right")


def _synonyms(axis: Any, rows: list[dict[str, Any]]) -> None:
    values = {
        n: [100 * r["accuracy"] for r in some] for (n,), some in grouped(rows, "variant").items()
    }
    _bars(axis, values, "(c) recall by another form of the key", "right, %")
    axis.set_xlim(0, 102)


def _count(axis: Any, rows: list[dict[str, Any]]) -> None:
    values = {
        n: [r["held_out_loss"] for r in some] for (n,), some in grouped(rows, "variant").items()
    }
    _bars(axis, values, "(d) counting, held-out loss", "nats a token")
    low = min(min(x) for x in values.values())
    axis.set_xlim(left=max(0.0, low - 0.1))


def _agree(axis: Any, rows: list[dict[str, Any]]) -> None:
    length = max(r["length"] for r in rows if "error" not in r)
    some = [r for r in rows if "error" not in r and r["length"] == length]
    names = list(dict.fromkeys(r["variant"] for r in some))
    for shift, (key, mark) in enumerate((("q", "o"), ("k", "s"), ("v", "^"))):
        for place, name in enumerate(names):
            for stream, fill in (("random", "none"), ("copies", None)):
                found = [
                    r[f"cosine_{key}"]
                    for r in some
                    if (r["variant"], r["stream"]) == (name, stream)
                ]
                colour = _COLOURS[name]
                axis.plot(
                    spread(found)[0],
                    place + 0.2 * (shift - 1),
                    mark,
                    color=colour,
                    markerfacecolor=colour if fill is None else "none",
                    markersize=5,
                )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0, color="#cccccc", linewidth=0.8)
    axis.set_title(f"(e) cosine with exact flips, T = {length}", fontsize=10)
    axis.set_xlabel("○ q  □ k  △ v; filled: copied passages, open: random")


def _cost(axis: Any, rows: list[dict[str, Any]]) -> None:
    full = max(r["routes"] or 0 for r in rows)
    for (name,), some in grouped(rows, "estimator").items():
        # Rows with fewer routes are another measurement; attention has none.
        some = sorted((r for r in some if r["routes"] in (None, full)), key=lambda r: r["length"])
        style = {"color": {**_COLOURS, **_COSTS}.get(name, "#444444"), "label": name}
        style["linestyle"] = "-" if name in _COLOURS else "--"
        x = [r["length"] for r in some]
        axis.plot(x, [r["milliseconds"] for r in some], marker="o", **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(f"(e) forward + backward, {full} routes of 4 bits", fontsize=10)
    axis.set_xlabel("T")
    axis.set_ylabel("ms")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


_TASKS = {"fit": _fit, "mqar": _mqar, "synonyms": _synonyms, "count": _count}
