"""The committed support matrix is what the code does: a quick part is run again."""

from __future__ import annotations

import json

import pytest

from tests import support_matrix
from tests.tuning.architectures import ARCHITECTURES

QUICK = ("gemma2", "falcon", "gpt2", "mamba")
QUICK_FEATURES = ("attach", "cached", "padding", "train")


@pytest.fixture(scope="module")
def committed():
    return json.loads(support_matrix.RESULT.read_text())


def test_every_architecture_is_in_it(committed):
    assert list(committed["rows"]) == list(ARCHITECTURES)
    for cells in committed["rows"].values():
        assert tuple(cells) == support_matrix.IMPLEMENTATIONS
        assert all(tuple(row) == support_matrix.FEATURES for row in cells.values())


@pytest.mark.parametrize("name", QUICK)
def test_a_part_of_it_is_current(committed, name):
    implementations = ("sdpa", "eager", "flash_attention_2", "no window")
    found = support_matrix.rows([name], "cpu", QUICK_FEATURES, implementations)[name]
    for implementation, cells in found.items():
        for feature, outcome in cells.items():
            assert outcome == committed["rows"][name][implementation][feature], (
                f"{name}, {implementation}, {feature} has changed; run "
                "python -m tests.support_matrix --write"
            )


def test_the_page_is_made_from_it(committed):
    gpu = support_matrix.RESULT.with_name("support_gpu.json")
    other = json.loads(gpu.read_text()) if gpu.exists() else None
    assert support_matrix.PAGE.read_text() == support_matrix.page(committed, other), (
        "run python -m tests.support_matrix --page"
    )
