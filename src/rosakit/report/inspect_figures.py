"""Figures of an inspection: distances, match lengths, and what the token route gains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from rosakit.evaluate.inspection import Inspection, Trace
from rosakit.report.plots import save_figure

__all__ = ["plot_inspection"]


def plot_inspection(
    inspection: Inspection, stem: str | os.PathLike[str], *, title: str | None = None
) -> tuple[Path, Path]:
    """Map of distances, match lengths near and far, loss with and without the token route.

    Args:
        inspection: what was read.
        stem: path without a suffix.
        title: above everything.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        InvalidInputError: a folder that cannot be written.
    """
    from matplotlib.figure import Figure

    readers = [t for t in inspection.traces if t.kind != "route"]
    gains = bool(inspection.base_log_prob)
    figure = Figure(figsize=(11, 3.2 + 0.22 * len(readers)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(0.6 + 0.12 * len(readers), 1.6))
    _map(figure, figure.add_subplot(grid[0, :]), inspection, readers)
    _lengths(figure.add_subplot(grid[1, 0] if gains else grid[1, :]), inspection, readers[0])
    if gains:
        _gain(figure.add_subplot(grid[1, 1]), inspection)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, Path(stem))


def _distance(trace: Trace) -> Any:
    position = np.asarray(trace.position)
    return np.where(position >= 0, np.arange(len(position)) - position, np.nan)


def _map(figure: Any, axis: Any, inspection: Inspection, readers: list[Trace]) -> None:
    shown = axis.imshow(
        np.log2(np.stack([_distance(t) for t in readers]) + 1),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
    )
    axis.set_yticks(range(len(readers)), [t.name for t in readers], fontsize=7)
    axis.set_xlabel("position, tokens")
    bar = figure.colorbar(shown, ax=axis, label="distance, tokens")
    marks = [m for m in (1, 4, 16, 64, 256, 1024, 4096, 16384) if m < len(inspection.tokens)]
    bar.set_ticks([float(np.log2(m + 1)) for m in marks], labels=[str(m) for m in marks])
    axis.set_title("how far back each position reads (white: nothing)", fontsize=10)


def _lengths(axis: Any, inspection: Inspection, trace: Trace) -> None:
    distance, length = _distance(trace), np.asarray(trace.length, dtype=float)
    window = inspection.window
    far = distance >= window if window is not None else np.zeros(len(length), dtype=bool)
    near = (length > 0) & ~far
    edges = 2.0 ** np.arange(0, max(2, np.ceil(np.log2(length.max() + 1)) + 1))
    parts = [(near, "inside the window", "#ff9f40"), (far, "beyond it", "#2ca02c")]
    kept = [(length[mask], label, color) for mask, label, color in parts if mask.any()]
    axis.hist(
        [x for x, _, _ in kept],
        bins=edges,
        stacked=True,
        label=[label for _, label, _ in kept],
        color=[color for _, _, color in kept],
    )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("match length, tokens")
    axis.set_ylabel("positions")
    axis.set_title(trace.name, fontsize=10)
    if kept:
        axis.legend(frameon=False, fontsize=8)


def _gain(axis: Any, inspection: Inspection) -> None:
    """Loss by position, averaged over a stretch so that single tokens do not hide the trend."""
    with_route, without = (
        -np.asarray(values[1:], dtype=float)
        for values in (inspection.log_prob, inspection.base_log_prob)
    )
    width = max(1, len(with_route) // 24)
    count = len(with_route) // width
    middle = np.arange(count) * width + width / 2
    for values, label, color in (
        (without, "without the token route", "#ff9f40"),
        (with_route, "with it", "#2ca02c"),
    ):
        axis.plot(middle, values[: count * width].reshape(count, width).mean(1), color=color,
                  label=label)  # fmt: skip
    if inspection.window is not None and inspection.window < len(inspection.tokens):
        axis.axvline(inspection.window, color="#555555", linewidth=1, linestyle=":")
    axis.set_xlabel("position, tokens (dotted: the window's edge)")
    axis.set_ylabel("nats a token")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
