"""The sweeps' summary as one figure: the late gap closed and needles, question by question.

python -m benchmarks.evidence.sweep_figure docs/results/evidence/sweep/summary.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.sweeps import GROUPS
from rosakit.report.plots import save_figure

__all__ = ["draw_sweeps"]

_COLOURS = ("#2ca02c", "#8fce8f")
_LEAST = -60.0
"""Percent: what is worse than the control by more would squeeze everything else."""


def draw_sweeps(summary: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """PNG and SVG; a group none of whose arms was run is left out."""
    from matplotlib.figure import Figure

    found = [(g, name, arm) for g in GROUPS for name, arm in g.finished(summary).items()]
    # The two that are 0 and 100 by definition, whatever their budget.
    found = [row for row in found if row[1].partition("@")[0] not in ("control", "full+trained")]
    rows = [(group, name) for group, name, _ in found]
    arms = [arm for _, _, arm in found]
    figure = Figure(figsize=(11, 1.6 + 0.27 * len(rows)), layout="constrained")
    gaps, needles = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    kinds = list(arms[0]["perplexity"])
    for offset, kind in enumerate(kinds):
        _bars(gaps, [a["gap_closed"].get(kind) for a in arms], offset, kind)
    for offset, (task, label) in enumerate((("niah", "single"), ("niah_confusable", "confusable"))):
        _bars(needles, [a["recall_beyond_window"].get(task) for a in arms], offset, label)
    # A line above each group, its question in the margin.
    firsts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1][0] != row[0]]
    for axis in (gaps, needles):
        for first in firsts[1:]:
            axis.axhline(first - 0.5, color="#bbbbbb", linewidth=0.8)
        axis.grid(alpha=0.25, axis="x")
        axis.axvline(0, color="#555555", linewidth=1)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower center",
                    bbox_to_anchor=(0.5, 1.02))  # fmt: skip
    for first in firsts:
        needles.text(1.02, first, rows[first][0].title, transform=needles.get_yaxis_transform(),
                     va="center", fontsize=8, color="#444444")  # fmt: skip
    gaps.set_yticks(range(len(rows)), [name for _, name in rows], fontsize=8)
    gaps.set_ylim(len(rows) - 0.5, -0.5)
    gaps.set_xlim(left=max(_LEAST, gaps.get_xlim()[0]))
    gaps.set_xlabel("late gap closed, % (0: control, 100: full attention, trained alike)")
    needles.set_xlabel("needles recalled beyond the window, %")
    png, svg = save_figure(figure, stem)
    return png, svg


def _bars(axis: Any, found: list[Mapping[str, Any] | None], offset: int, label: str) -> None:
    place = [i + 0.36 * offset - 0.18 for i in range(len(found))]
    axis.barh(
        place, [100 * f["mean"] if f else 0 for f in found], height=0.34, label=label,
        xerr=[100 * (f["sd"] or 0) if f else 0 for f in found], color=_COLOURS[offset],
        error_kw={"elinewidth": 0.8},
    )  # fmt: skip


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for path in draw_sweeps(json.loads(place.read_text(encoding="utf-8")), place.parent / "sweep"):
        print(path)
