"""Typed results: numbers, JSON there and back, atomic files, the environment."""

from __future__ import annotations

import json
import math
import os

import pytest

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.evaluate import (
    EvaluationResult,
    NiahCell,
    NiahResult,
    PerplexityResult,
    PositionBucket,
    VariantResult,
    describe_environment,
)
from rosakit.evaluate.results import write_json


def perplexity_of(*values):
    edges = (0, 256, 512, 1024)
    buckets = [
        PositionBucket(a, b, 100, 100 * math.log(v))
        for a, b, v in zip(edges, edges[1:], values, strict=False)
    ]
    return PerplexityResult(tuple(buckets), 4)


def grid(right):
    cells = (NiahCell(512, 0.0, 2, right, 2, right), NiahCell(512, 1.0, 2, 2, 0, 0))
    return NiahResult(cells, 256, "repeat", 0)


def example():
    variants = {
        "full": VariantResult(perplexity_of(8.0, 5.0, 4.0), grid(2), description="full"),
        "window+sinks": VariantResult(perplexity_of(8.0, 6.0, 6.0), grid(0)),
        "control": VariantResult(perplexity_of(8.0, 6.0, 5.9), grid(0), 10),
        "rosa": VariantResult(
            perplexity_of(7.9, 5.5, 4.9), grid(1), 10, other={"plays": perplexity_of(9.0)}
        ),
        "bare": VariantResult(perplexity_of(8.0, 60.0, 70.0)),
    }
    settings = {"window": 256, "sink_tokens": 4, "name": "tiny"}
    return EvaluationResult(variants, describe_environment(), 0, 12.34, settings)


def test_numbers():
    found = perplexity_of(8.0, 2.0)
    assert found.ppl == pytest.approx(4.0)
    assert found.beyond(256) == pytest.approx(2.0)
    assert math.isnan(found.beyond(4096))
    assert PositionBucket(0, 1, 1, 1e6).ppl == math.inf
    needles = grid(1)
    assert needles.accuracy == pytest.approx(3 / 4)
    assert needles.accuracy_beyond == pytest.approx(1 / 2)
    assert math.isnan(NiahResult((), 256, "repeat", 0).accuracy_beyond)


def test_share_of_the_gap():
    result = example()
    names = {"floor": "window+sinks", "ceiling": "full"}
    late = result.gap_closed("rosa", beyond=512, **names)
    assert late == pytest.approx(math.log(6 / 4.9) / math.log(6 / 4))
    assert result.gap_closed("full", **names) == pytest.approx(1)
    assert result.gap_closed("nobody", **names) is None
    assert result.gap_closed("rosa", floor="full", ceiling="window+sinks") is None


def test_json_has_what_readers_expect(tmp_path):
    path = example().save(tmp_path / "new" / "results.json")
    values = json.loads(path.read_text())
    assert {"hardware", "versions", "seed", "seconds", "variants", "date", "commit"} <= set(values)
    rosa = values["variants"]["rosa"]
    assert rosa["ppl_by_position"] == pytest.approx({"0-256": 7.9, "256-512": 5.5, "512-1024": 4.9})
    assert rosa["niah"] == 0.5
    assert rosa["other"]["plays"]["ppl"] == pytest.approx(9.0)
    assert values["variants"]["bare"]["niah"] is None
    assert values["versions"]["torch"]
    assert values["hardware"]["cores"] >= 1


def test_json_there_and_back(tmp_path):
    result = example()
    again = EvaluationResult.load(result.save(tmp_path / "results.json"))
    assert again.variants == result.variants
    assert again.environment == result.environment
    assert again.settings == result.settings


def test_needles_that_cannot_be_counted_are_null(tmp_path):
    near = NiahResult((NiahCell(64, 0.0, 2, 2, 0, 0),), 256, "repeat", 0)
    assert VariantResult(perplexity_of(8.0), near).to_dict()["niah"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CheckpointError):
        EvaluationResult.load(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        EvaluationResult.load(tmp_path / "absent.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", {"x": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InvalidInputError, match="No space left"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
