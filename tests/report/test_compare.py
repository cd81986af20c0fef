"""Comparing runs: names that tell them apart, a page that a browser shows, figures."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.report import compare_results, load_named, plot_comparison
from tests.evaluate.test_results import example
from tests.report.chromium import opened


def saved(tmp_path):
    for name in ("one", "two"):
        example().save(tmp_path / name / "evaluation.json")
    example().save(tmp_path / "three.json")
    return [tmp_path / "one", tmp_path / "two" / "evaluation.json", tmp_path / "three.json"]


def test_results_are_named_by_folder_or_file(tmp_path):
    paths = saved(tmp_path)
    assert list(load_named(paths)) == ["one", "two", "three"]
    example().save(tmp_path / "deep" / "one" / "evaluation.json")
    both = load_named([paths[0], tmp_path / "deep" / "one"])
    assert list(both) == [str(tmp_path / p / "evaluation.json") for p in ("one", "deep/one")]
    with pytest.raises(InvalidInputError, match="named twice"):
        load_named([paths[0], paths[0]])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_named([tmp_path / "none"])
    with pytest.raises(InvalidInputError, match="nothing to compare"):
        load_named([])


def test_a_browser_shows_every_run_beside_the_others(tmp_path):
    named = load_named(saved(tmp_path))
    page = compare_results(named, tmp_path / "page.html", title="A < B")
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=|https?://(?!www\.w3\.org)|@import|url\(""", text)
    dom = opened(page)
    assert "<h1 id=\"title\">A &lt; B</h1>" in dom  # fmt: skip
    curves = sum(1 + len(v.other) for v in example().variants.values())
    assert dom.count("<polyline") == 3 * curves
    assert "<h3>plays</h3>" in dom
    variants = dom.split('id="table"')[1].split("</table>")[0]
    assert len(re.findall("<tr", variants)) == 1 + 3 * len(example().variants)
    assert "4.90" in variants
    grids = dom.split('id="grids"')[1]
    measured = [v for v in example().variants.values() if v.niah is not None]
    assert grids.count("length</th>") == 3 * len(measured)
    assert "hsl(" in grids or "rgb(" in grids


def claims(page):
    """The verdict on each variant of the first kind of text."""
    gains = opened(page).split('id="gains"')[1].split("</table>")[0]
    rows = re.findall(r"<tr[^>]*><td>run</td><td>([^<]+)</td>(.*?)</tr>", gains)
    return {name: cells.rsplit("<td>", 1)[1].split("<")[0] for name, cells in rows}


def test_a_long_range_gain_is_claimed_only_where_it_is_larger_far_than_near(tmp_path):
    found = claims(compare_results({"run": example()}, tmp_path / "page.html"))
    control = example().variants["control"].perplexity.buckets
    for name, claim in found.items():
        buckets = example().variants[name].perplexity.buckets
        change = [
            a.ppl / b.ppl - 1 for a, b in zip(buckets, control, strict=True) if a.tokens
        ]  # fmt: skip
        gained = change[-1] < change[0] - 0.01 and change[-1] < -0.01
        assert claim == ("yes" if gained else "no")
    assert found["rosa"] == "yes"


def test_noise_is_no_gain_and_a_budget_is_read_against_its_own_control(tmp_path):
    base = example().variants["control"]

    def scaled(*factors):
        buckets = tuple(
            dataclasses.replace(b, nll=b.nll + b.tokens * math.log(f))
            for b, f in zip(base.perplexity.buckets, factors, strict=False)
        )
        return dataclasses.replace(
            base, perplexity=dataclasses.replace(base.perplexity, buckets=buckets)
        )

    variants = {
        "control": scaled(1, 1, 1), "control@4M": scaled(0.8, 0.8, 0.8),
        "noise": scaled(1.001, 1, 0.998), "rosa@4M": scaled(0.8, 0.7, 0.6),
        "adapted@4M": scaled(0.8, 0.8, 0.8), "alone@2M": scaled(1, 0.9, 0.8),
    }  # fmt: skip
    result = dataclasses.replace(example(), variants=variants)
    found = claims(compare_results({"run": result}, tmp_path / "page.html"))
    # `alone` has no control of its budget: the plain one stands in.
    assert found == {"noise": "no", "rosa@4M": "yes", "adapted@4M": "no", "alone@2M": "yes"}


def test_figures_are_drawn(tmp_path):
    png, svg = plot_comparison({"a": example(), "b": example()}, tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    with pytest.raises(InvalidInputError, match="nothing to compare"):
        plot_comparison({}, tmp_path / "figure")
