"""How `rosakit eval` shows and saves its result."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rosakit.evaluate import EvaluationResult

__all__ = ["publish"]


def publish(result: EvaluationResult, folder: Path) -> None:
    """Print the table and write ``evaluation.json`` into a folder."""
    Console(highlight=False).print(_table(result))
    print(f"results: {result.save(folder / 'evaluation.json')}")


def _table(result: EvaluationResult) -> Table:
    """Perplexity overall and by position, needles beyond the window, trained parameters."""
    labels: list[str] = []
    for variant in result.variants.values():
        labels += [k for k in variant.perplexity.ppl_by_position if k not in labels]
    table = Table(title=f"window of {result.settings['window']} tokens", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in ("perplexity", *labels, "needles", "trained"):
        table.add_column(name, justify="right")
    for name, variant in result.variants.items():
        by_position = variant.perplexity.ppl_by_position
        found = math.nan if variant.niah is None else variant.niah.accuracy_beyond
        table.add_row(
            name,
            f"{variant.perplexity.ppl:.3f}",
            *(f"{by_position[k]:.3f}" if k in by_position else "" for k in labels),
            "" if math.isnan(found) else f"{found:.0%}",
            f"{variant.trained_parameters:,}",
        )
    return table
