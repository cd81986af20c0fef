"""Tables and plots from a result."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from rosakit.errors import InvalidInputError
from rosakit.report import gap_lines, plot_perplexity_and_needles, result_table
from tests.evaluate.test_results import example


def rendered(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_shows_every_variant_and_bucket():
    text = rendered(result_table(example()))
    for name in ("full", "window+sinks", "control", "rosa", "bare", "512-1024"):
        assert name in text
    row = next(line for line in text.splitlines() if "rosa" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "rosa", "5.97", "7.90", "5.50", "4.90", "50% (1/2)", "10",
    ]  # fmt: skip


def test_a_table_of_another_kind_of_text():
    result = example()
    only = dataclasses.replace(result, variants={"rosa": result.variants["rosa"]})
    text = rendered(result_table(only, "plays"))
    assert "9.00" in text
    assert "needles" not in text


def test_gap_lines_compare_with_the_control_by_position():
    result = example()
    other = {**result.variants}
    other["rosa"] = dataclasses.replace(other["rosa"], other={})
    lines = gap_lines(dataclasses.replace(result, variants=other))
    assert len(lines) == 3
    assert "of the gap" not in lines[0]  # inside the window
    assert "rosa 4.90, control 5.90" in lines[2]
    assert "(-16.9%); 48% of the gap to full closed" in lines[2]
    del other["control"]
    assert gap_lines(dataclasses.replace(result, variants=other)) == []


def test_plots_are_written_and_repeat(tmp_path):
    result = example()
    png, svg = plot_perplexity_and_needles(result, tmp_path / "sub" / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    assert sorted(p.name for p in png.parent.iterdir()) == ["plot.png", "plot.svg"]
    bare = dataclasses.replace(result.variants["bare"], niah=None)
    alone = dataclasses.replace(result, variants={"bare": bare}, settings={})
    plot_perplexity_and_needles(alone, tmp_path / "alone")
    with pytest.raises(InvalidInputError, match="nothing to plot"):
        plot_perplexity_and_needles(dataclasses.replace(result, variants={}), tmp_path / "none")
