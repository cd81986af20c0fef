"""The inspection page works in a browser, alone and whatever the text holds; figures are drawn."""

from __future__ import annotations

import re

import pytest

from rosakit.errors import InvalidInputError
from rosakit.evaluate.inspection import Inspection, Trace
from rosakit.report import inspection_page, plot_inspection, write_inspection
from tests.report.chromium import opened, picture

NASTY = ["</script>", "<b>", "&amp;", "\n", "\u2028", "é", "'\"", "</span>", "a", "b"]


def sample(window=4):
    """Ten nasty tokens; position 9 recalls what followed tokens 0..1."""
    return Inspection(
        NASTY,
        [None, *(-0.5 - 0.1 * i for i in range(9))],
        [None, *(-0.7 - 0.1 * i for i in range(9))],
        (
            Trace("token route, candidate 1", "candidate", [-1] * 9 + [2], [0] * 9 + [2],
                  [0.0] * 9 + [0.25]),
            Trace("layer 3", "layer", [-1] + [0] * 9, [0] + [1] * 9, [0.5] * 10),
            Trace("layer 3, route 1", "route", [-1] * 9 + [5], [0] * 9 + [3], [1.0] * 10),
        ),
        {"token route": {"hit_rate": 0.5, "route_match_length": 2.0}, "layer 3": {"entropy": 1.5}},
        {"layer 3": ["q and k <agree> in 50% of their bits"]},
        window,
        1,
        {"model": "tiny"},
    )  # fmt: skip


def classes(dom):
    """Index of every token span that has a class, by class."""
    found = {}
    for tag in re.findall(r'<span [^>]*data-i="\d+"[^>]*>', dom):
        index = int(re.search(r'data-i="(\d+)"', tag).group(1))
        for kind in (re.search(r'class="([^"]*)"', tag) or [None, ""])[1].split():
            found.setdefault(kind, []).append(index)
    return found


def test_the_page_needs_nothing_but_itself():
    page = inspection_page(sample())
    assert not re.search(r"""(src|href)\s*=|https?://(?!www\.w3\.org)|@import|url\(""", page)
    assert page.count("</script>") == 2  # the data's own is escaped


def test_a_browser_shows_what_a_position_recalled(tmp_path):
    page = write_inspection(sample(), tmp_path / "page.html", "A & B")
    dom = opened(page, "#reader=0&token=9")
    assert len(re.findall(r"<span [^>]*data-i=", dom)) == 10
    assert classes(dom) == {"here": [9], "suffix": [8, 9], "hit": [0, 1], "next": [2]}
    assert "match length: </span><code>2</code>" in dom
    assert "distance: </span><code>7, beyond the window</code>" in dom
    assert "gate: </span><code>25.0%</code>" in dom
    assert "&lt;agree&gt;" in dom
    assert "<h1 id=\"title\">A &amp; B</h1>" in dom  # fmt: skip
    other = opened(page, "#reader=2&token=9")
    assert classes(other) == {"here": [9], "suffix": [7, 8, 9], "hit": [2, 3, 4], "next": [5]}
    assert classes(opened(page)) == {}  # nothing is pointed at yet


def test_the_picture_is_not_blank(tmp_path):
    page = write_inspection(sample(None), tmp_path / "page.html")
    data = picture(page, tmp_path / "page.png")
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_figures_are_drawn(tmp_path):
    png, svg = plot_inspection(sample(), tmp_path / "deep" / "figure", title="tiny")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    for window in (None, 100):  # nothing beyond a window
        plot_inspection(sample(window), tmp_path / "figure")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot write"):
        write_inspection(sample(), tmp_path / "file" / "page.html")
