"""Comparing several results: one HTML page, and the same as PNG and SVG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rosakit.errors import InvalidInputError
from rosakit.evaluate import EvaluationResult, NiahResult
from rosakit.report.page import render_page, write_page
from rosakit.report.plots import draw_curves, look_of, save_figure

__all__ = ["compare_results", "load_named", "plot_comparison"]

CROWD = 9
"""Variants of a run whose names still fit beside its curves."""


def load_named(paths: Sequence[str | os.PathLike[str]]) -> dict[str, EvaluationResult]:
    """Results by a name that tells them apart: the file's, or its folder's.

    Args:
        paths: JSON files of `EvaluationResult.save`, or folders with an ``evaluation.json``.

    Raises:
        CheckpointError: a path that holds no result.
        InvalidInputError: no path, or one path twice.
    """
    if not paths:
        raise InvalidInputError("nothing to compare: name at least one result")
    files = [Path(p) / "evaluation.json" if Path(p).is_dir() else Path(p) for p in paths]
    plain = [f.parent.name if f.name == "evaluation.json" else f.stem for f in files]
    named: dict[str, EvaluationResult] = {}
    for file, name in zip(files, plain, strict=True):
        label = name if plain.count(name) == 1 else str(file)
        if label in named:
            raise InvalidInputError(f"{file} was named twice")
        named[label] = EvaluationResult.load(file)
    return named


def compare_results(
    named: Mapping[str, EvaluationResult],
    path: str | os.PathLike[str],
    *,
    title: str = "Runs compared",
) -> Path:
    """Write one self-contained page: curves, tables, gains over the controls, needle maps.

    Raises:
        InvalidInputError: nothing to compare, or a file that cannot be written.
    """
    if not named:
        raise InvalidInputError("nothing to compare: give at least one result")
    runs = [{"name": name, "result": result.to_dict()} for name, result in named.items()]
    return write_page(path, render_page("compare", title, runs))


def plot_comparison(
    named: Mapping[str, EvaluationResult], stem: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Curves of every run above its needle maps, as PNG and SVG.

    Raises:
        InvalidInputError: nothing to compare, or a folder that cannot be written.
    """
    from matplotlib.figure import Figure

    if not named:
        raise InvalidInputError("nothing to compare: give at least one result")
    maps = {
        name: [(n, v.niah) for n, v in result.variants.items() if v.niah is not None]
        for name, result in named.items()
    }
    deepest = max(len(m) for m in maps.values())
    columns = len(named)
    figure = Figure(figsize=(5.2 * columns, 4.2 + 1.5 * ((deepest + 1) // 2)), layout="constrained")
    outer = figure.add_gridspec(
        1 + bool(deepest),
        columns,
        height_ratios=[4.2, 1.5 * ((deepest + 1) // 2)][: 1 + bool(deepest)],
    )
    top = None
    for column, (name, result) in enumerate(named.items()):
        axis = figure.add_subplot(outer[0, column], sharey=top)
        top = axis if top is None else top
        near = [n for n in result.variants if n != "window" or len(result.variants) < 3]
        draw_curves(axis, result, near)
        axis.set_title(name, fontsize=10)
        if len(near) > CROWD:  # below: inside, it would hide the curves
            axis.legend(
                frameon=False, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14)
            )
        else:
            axis.legend(frameon=False, fontsize=7)
        if maps[name]:
            inner = outer[1, column].subgridspec((deepest + 1) // 2, 2)
            for place, (variant, grid) in enumerate(maps[name]):
                _needles(figure.add_subplot(inner[place // 2, place % 2]), variant, grid)
    return save_figure(figure, Path(stem))


def _needles(axis: Any, name: str, grid: NiahResult) -> None:
    """One needle map: length across, depth down, share recalled as colour and number."""
    lengths = sorted({cell.length for cell in grid.cells})
    depths = sorted({cell.depth for cell in grid.cells})
    table = np.full((len(depths), len(lengths)), np.nan)
    for cell in grid.cells:
        table[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
    # Past the ends of the map, so that its darkest colours leave the numbers readable.
    axis.imshow(table, vmin=-0.3, vmax=1.3, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(table):
        if not np.isnan(share):
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7)
    axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=7)
    axis.set_title(name, fontsize=8, color=look_of(name, 0)["color"])
