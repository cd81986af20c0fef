"""Plots of evaluation results, as PNG and SVG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosakit.errors import InvalidInputError
from rosakit.evaluate import EvaluationResult

__all__ = ["draw_curves", "look_of", "plot_perplexity_and_needles", "save_figure"]

_LOOKS: dict[str, dict[str, Any]] = {
    "full": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "full+trained": {"color": "#888888", "linestyle": "-", "marker": "s"},
    "window": {"color": "#d62728", "linestyle": "-", "marker": "v"},
    "window+sinks": {"color": "#ff9f40", "linestyle": "-", "marker": "^"},
    "control": {"color": "#1f77b4", "linestyle": "--", "marker": "x"},
    "rosa": {"color": "#2ca02c", "linestyle": "-", "marker": "D", "linewidth": 2.5},
}
_BASELINE = "window+sinks"
_SPARE = ("#9467bd", "#8c564b", "#e377c2", "#17becf")
_STROKES = ("-", "--", ":", "-.")


def plot_perplexity_and_needles(
    result: EvaluationResult, stem: str | os.PathLike[str], *, title: str | None = None
) -> tuple[Path, Path]:
    """Perplexity by position, the same against the untrained window with sinks, and needles.

    Args:
        result: what was measured.
        stem: path without a suffix.
        title: above everything; None for a description of the run.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        InvalidInputError: no variants, or a folder that cannot be written.
    """
    from matplotlib.figure import Figure

    if not result.variants:
        raise InvalidInputError("there is nothing to plot: the result has no variants")
    needles = [n for n, v in result.variants.items() if v.niah is not None and v.niah.beyond]
    names = list(result.variants)
    # The bare window is worse by so much that nothing else could be seen beside it.
    near = [n for n in names if n != "window"] if _BASELINE in names else []
    width = 1 + bool(near) + bool(needles)
    # A figure of its own instead of pyplot: no global state, no display.
    figure = Figure(figsize=(5.2 * width, 4.6), layout="constrained")
    axes = list(figure.subplots(1, width, squeeze=False)[0])
    draw_curves(axes[0], result, names)
    axes[0].legend(frameon=False, fontsize=9)
    if near:
        _changes(axes[1], result, near)
    if needles:
        _bars(axes[-1], result, needles)
    figure.suptitle(_describe(result) if title is None else title, fontsize=11)
    return save_figure(figure, Path(stem))


def draw_curves(axis: Any, result: EvaluationResult, names: Sequence[str]) -> None:
    """Perplexity by position of the named variants, on a logarithmic axis."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    labels: list[str] = []
    for index, name in enumerate(names):
        values = result.variants[name].perplexity.ppl_by_position
        labels += [label for label in values if label not in labels]
        places = [labels.index(label) for label in values]
        axis.plot(places, list(values.values()), label=name, **look_of(name, index))
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    ticks = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 500, 1000)
    axis.set_yticks([t for t in ticks if low <= t <= high] or [low, high])
    axis.set_title("perplexity on held-out files")
    _positions(axis, labels, result)


def _changes(axis: Any, result: EvaluationResult, names: Sequence[str]) -> None:
    """Perplexity relative to the untrained window with sinks, in percent."""
    reference = result.variants[_BASELINE].perplexity.ppl_by_position
    labels = list(reference)
    for index, name in enumerate(names):
        values = result.variants[name].perplexity.ppl_by_position
        shared = [label for label in values if label in reference]
        axis.plot(
            [labels.index(label) for label in shared],
            [100 * (values[label] / reference[label] - 1) for label in shared],
            label=name,
            **look_of(name, index),
        )
    axis.set_title(f"change against {_BASELINE}, %")
    _positions(axis, labels, result)


def _positions(axis: Any, labels: Sequence[str], result: EvaluationResult) -> None:
    """The axis of position buckets, with the window's edge."""
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel("position in the file, tokens")
    axis.grid(alpha=0.25)
    window = result.settings.get("window")
    edges = [int(label.split("-")[1]) for label in labels]
    if window in edges[:-1]:
        place = edges.index(window) + 0.5
        axis.axvline(place, color="#555555", linewidth=1, linestyle=":")
        axis.text(
            place - 0.04,
            0.03,
            f"window ({window})",
            rotation=90,
            va="bottom",
            ha="right",
            fontsize=8,
            color="#555555",
            transform=axis.get_xaxis_transform(),
        )


def _bars(axis: Any, result: EvaluationResult, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        grid = result.variants[name].niah
        assert grid is not None
        share = grid.accuracy_beyond
        look = look_of(name, index)
        axis.bar(index, share, color=look["color"], width=0.7)
        axis.text(index, share + 0.02, f"{share:.0%}", ha="center", fontsize=9)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_ylim(0, 1.12)
    axis.set_ylabel("share recalled exactly")
    first = result.variants[names[0]].niah
    assert first is not None
    axis.set_title(f"needles beyond the window ({first.beyond})")
    axis.grid(alpha=0.25, axis="y")


def look_of(name: str, index: int) -> dict[str, Any]:
    """How a variant is drawn; one without a look of its own gets the spare one at `index`."""
    turn, colour = divmod(index, len(_SPARE))
    spare = {"color": _SPARE[colour], "marker": ".", "linestyle": _STROKES[turn % len(_STROKES)]}
    return _LOOKS.get(name, spare)


def _describe(result: EvaluationResult) -> str:
    settings = result.settings
    parts = [str(settings[k]) for k in ("name",) if k in settings]
    if "window" in settings:
        parts.append(f"window {settings['window']}, {settings.get('sink_tokens', 0)} sink tokens")
    parts.append(f"seed {result.seed}")
    return ", ".join(parts)


def save_figure(figure: Any, stem: Path) -> tuple[Path, Path]:
    """Save a figure as PNG and SVG; each appears complete or not at all.

    Raises:
        InvalidInputError: a folder that cannot be written.
    """
    paths = (stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg"))
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=stem.parent) as folder:
            for path in paths:
                draft = Path(folder) / path.name
                # No date inside: the same numbers give the same file.
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(draft, dpi=130, metadata=metadata)
                os.replace(draft, path)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write {paths[0]}: {error.strerror or error}; free some space or name another "
            "folder"
        ) from error
    return paths
