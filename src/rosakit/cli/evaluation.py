"""How `rosakit eval` shows and saves its result."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rosakit.evaluate import EvaluationResult
from rosakit.report import gap_lines, plot_perplexity_and_needles, result_table

__all__ = ["publish"]


def publish(result: EvaluationResult, folder: Path) -> None:
    """Write ``evaluation.json`` and the plot into a folder; print the table.

    Saved first: a closed pipe must not lose minutes of measuring.
    """
    saved = result.save(folder / "evaluation.json")
    png, svg = plot_perplexity_and_needles(result, folder / "evaluation")
    console = Console(highlight=False, soft_wrap=True)
    console.print(result_table(result))
    for line in gap_lines(result):
        console.print(line)
    console.print(f"written: {saved}, {png}, {svg}")
