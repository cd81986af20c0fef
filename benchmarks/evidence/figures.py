"""The summary of the evidence as one figure a window: curves, shares of the gap, recall.

python -m benchmarks.evidence.figures docs/results/evidence/summary.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosakit.report.plots import save_figure

__all__ = ["draw"]

COLOURS = {
    "full": "#777777",
    "full+trained": "#222222",
    "window+sinks": "#ff9f40",
    "control": "#1f77b4",
    "route": "#9467bd",
    "recall": "#8fce8f",
    "recall-untrained": "#c5b35a",
    "rosa+hide50+repeat": "#d62728",
    "rosa": "#2ca02c",
}
"""Arms that the curves and the bars of recall show."""

TASKS = (
    ("niah", "needle"),
    ("niah_paraphrase", "needle,\nother words"),
    ("niah_multi", "needle among\nothers"),
    ("niah_confusable", "confusable\nneedles"),
    ("mqar_lines", "MQAR,\nlines"),
)


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """One PNG and one SVG a window; returns their paths."""
    from matplotlib.figure import Figure

    written: list[Path] = []
    for window, found in summary["windows"].items():
        arms = found["arms"]
        kinds = list(next(iter(arms.values()))["perplexity"])
        figure = Figure(figsize=(6 * max(len(kinds), 2), 11), layout="constrained")
        grid = figure.add_gridspec(2, 2 * len(kinds))
        axes = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(len(kinds))]
        axes += [figure.add_subplot(grid[1, : len(kinds)])]
        axes += [figure.add_subplot(grid[1, len(kinds) :])]
        for axis, kind in zip(axes, kinds, strict=False):
            _curves(axis, arms, kind)
        _shares(axes[-2], arms, kinds)
        _recall(axes[-1], arms)
        figure.suptitle(f"{summary['model']}, window {window} and 4 sinks", fontsize=11)
        written += save_figure(figure, folder / f"w{window}")
    return written


def _curves(axis: Any, arms: Mapping[str, Any], kind: str) -> None:
    """Perplexity against full attention trained alike, where there is one: the gaps are small."""
    reference = arms.get("full+trained", next(iter(arms.values())))["perplexity"][kind]
    labels = list(reference)
    for name in (n for n in COLOURS if n in arms):
        values = arms[name]["perplexity"][kind]
        change = [100 * (values[x]["mean"] / reference[x]["mean"] - 1) for x in labels]
        spread = [100 * (values[x]["sd"] or 0) / reference[x]["mean"] for x in labels]
        axis.errorbar(
            range(len(labels)), change, spread, label=name, color=COLOURS[name], marker="o",
            capsize=2, linewidth=2.5 if name == "rosa" else 1.5,
        )  # fmt: skip
    axis.set_xticks(range(len(labels)), labels, rotation=30)
    axis.set_xlabel("position, tokens")
    axis.set_title(f"{kind}: perplexity above full attention trained alike, %", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7)


def _shares(axis: Any, arms: Mapping[str, Any], kinds: list[str]) -> None:
    names = [n for n, a in arms.items() if a["gap_closed"] and a["trained_parameters"]]
    # The two that are 0 and 100 by definition, whatever their budget.
    names = [n for n in names if n.partition("@")[0] not in ("control", "full+trained")]
    for offset, kind in enumerate(kinds):
        found = [arms[n]["gap_closed"].get(kind) for n in names]
        place = [i + 0.4 * offset - 0.2 for i in range(len(names))]
        axis.barh(
            place, [100 * f["mean"] if f else 0 for f in found], height=0.38, label=kind,
            xerr=[100 * (f["sd"] or 0) if f else 0 for f in found],
            color=("#2ca02c", "#8fce8f")[offset % 2],
        )  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="#555555", linewidth=1)
    axis.set_title("share of the late gap closed, % (0: control, 100: full)", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25, axis="x")


def _recall(axis: Any, arms: Mapping[str, Any]) -> None:
    # What recalls nothing at all would only take room.
    names = [n for n in COLOURS if n in arms and _any(arms[n]["recall_beyond_window"])]
    tasks = [t for t in TASKS if any(t[0] in arms[n]["recall_beyond_window"] for n in names)]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        found = [arms[name]["recall_beyond_window"].get(task) for task, _ in tasks]
        place = [i + width * (index - len(names) / 2 + 0.5) for i in range(len(tasks))]
        axis.bar(
            place, [100 * f["mean"] if f else 0 for f in found], width=width, label=name,
            yerr=[100 * (f["sd"] or 0) if f else 0 for f in found], color=COLOURS[name],
        )  # fmt: skip
    axis.set_xticks(range(len(tasks)), [label for _, label in tasks], fontsize=8)
    axis.set_ylim(0, 128)
    axis.set_yticks(range(0, 101, 20))
    axis.set_title("recalled beyond the window, % (arms not shown: 0)", fontsize=9)
    if names:
        axis.legend(frameon=False, fontsize=7, ncols=3, loc="upper center")
    axis.grid(alpha=0.25, axis="y")


def _any(recalled: Mapping[str, Any]) -> bool:
    return any(recalled[task]["mean"] > 0 for task, _ in TASKS if task in recalled)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for path in draw(json.loads(place.read_text(encoding="utf-8")), place.parent):
        print(path)
