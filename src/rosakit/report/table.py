"""An evaluation result as a table and a few honest sentences."""

from __future__ import annotations

import math

from rich.table import Table

from rosakit.evaluate import EvaluationResult, PerplexityResult, VariantResult

__all__ = ["gap_lines", "result_table"]


def result_table(result: EvaluationResult, kind: str | None = None) -> Table:
    """Perplexity overall and by position, needles beyond the window, trained parameters.

    Args:
        result: what was measured.
        kind: another kind of held-out text (see `VariantResult`); None for the first.
    """
    rows = {name: _perplexity(variant, kind) for name, variant in result.variants.items()}
    labels = list(dict.fromkeys(label for row in rows.values() for label in row.ppl_by_position))
    needles = kind is None and any(v.niah is not None for v in result.variants.values())
    table = Table()
    table.add_column("variant", no_wrap=True)
    table.add_column("perplexity", justify="right")
    for label in labels:
        table.add_column(label, justify="right")
    if needles:
        table.add_column("needles beyond\nthe window", justify="right")
    table.add_column("trained\nparameters", justify="right")
    for name, row in rows.items():
        variant = result.variants[name]
        by_position = row.ppl_by_position
        cells = [name, _shown(row.ppl), *(_shown(by_position.get(label)) for label in labels)]
        if needles:
            cells.append(_share(variant))
        table.add_row(*cells, f"{variant.trained_parameters:,}", style=_STYLES.get(name))
    return table


_STYLES = {"rosa": "bold"}


_NO_GAP = 0.01
"""Nats a token below which there is no gap worth a percentage."""


def gap_lines(
    result: EvaluationResult,
    *,
    variant: str = "rosa",
    control: str = "control",
    ceiling: str | None = None,
) -> list[str]:
    """What retrieval alone explains: the variant against its control, near and far.

    Args:
        result: what was measured.
        variant, control: names; the control had the same training without retrieval.
        ceiling: name of the variant that closes the gap completely; None for full attention,
            trained alike if it was measured, untrained otherwise.
    """
    if not {variant, control} <= result.variants.keys():
        return []
    if ceiling is None:
        ceiling = next((n for n in ("full+trained", "full") if n in result.variants), None)
    kinds: list[str | None] = [None, *result.variants[variant].other]
    lines = []
    for kind in kinds:
        label = result.settings.get("kind", "held-out text") if kind is None else kind
        ours, theirs = (_perplexity(result.variants[n], kind) for n in (variant, control))
        best = None if ceiling is None else _perplexity(result.variants[ceiling], kind)
        for bucket in range(len(ours.buckets)):
            if not ours.buckets[bucket].tokens:
                continue
            near, far = (x.buckets[bucket].nll / x.buckets[bucket].tokens for x in (ours, theirs))
            text = (
                f"{label}, tokens {ours.buckets[bucket].label}: {variant} "
                f"{math.exp(near):.2f}, {control} {math.exp(far):.2f} "
                f"({100 * (math.exp(near - far) - 1):+.1f}%)"
            )
            if best is not None and ours.buckets[bucket].start > 0:
                low = best.buckets[bucket].nll / best.buckets[bucket].tokens
                if far - low > _NO_GAP:
                    closed = (far - near) / (far - low)
                    text += f"; {100 * closed:.0f}% of the gap to {ceiling} closed"
            lines.append(text)
    return lines


def _perplexity(variant: VariantResult, kind: str | None) -> PerplexityResult:
    return variant.perplexity if kind is None else variant.other[kind]


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def _share(variant: VariantResult) -> str:
    if variant.niah is None or not variant.niah.beyond:
        return ""
    right = sum(cell.beyond_correct for cell in variant.niah.cells)
    return f"{variant.niah.accuracy_beyond:.0%} ({right}/{variant.niah.beyond})"
