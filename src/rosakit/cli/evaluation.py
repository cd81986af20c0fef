"""How `rosakit eval` shows and saves its result."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rosakit.evaluate import EvaluationResult
from rosakit.report import gap_lines, plot_perplexity_and_needles, result_table

__all__ = ["publish"]


def publish(result: EvaluationResult, folder: Path) -> None:
    """Print the table; write ``evaluation.json`` and the plot into a folder."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(result_table(result))
    for line in gap_lines(result):
        console.print(line)
    saved = result.save(folder / "evaluation.json")
    png, svg = plot_perplexity_and_needles(result, folder / "evaluation")
    console.print(f"written: {saved}, {png}, {svg}")
