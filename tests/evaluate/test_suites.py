"""A plan measures what it names, keeps what is finished, and goes on from there."""

from __future__ import annotations

import dataclasses
import json

import pytest

from rosakit.errors import InvalidInputError
from rosakit.evaluate import EvaluationResult, describe_environment
from rosakit.evaluate.suites import SUITES, Plan, measure_variant
from rosakit.tuning import RosaConfig, attach
from tests.tuning import texts
from tests.tuning.tiny import build, tokens

ROWS = [row.tolist() for row in tokens(3, 200, kinds=40)]
PLAN = Plan(
    {"code": ROWS[:2], "prose": ROWS[2:]},
    window=32,
    sink_tokens=2,
    length=200,
    suites=("perplexity", "distance", "mqar", "copying", "efficiency"),
    lengths=(160,),
    samples=2,
    pairs=(3,),
)


def model():
    config = RosaConfig(window=32, sink_tokens=2, adapters=False, token_route=True)
    return attach(build(depth=1), config)


def test_everything_that_is_named_is_measured_and_survives_json():
    seen = []
    found = measure_variant(
        model(), texts.tokenizer(), PLAN, trained=7, progress=lambda *step: seen.append(step[0])
    )
    assert found.perplexity.documents == 2
    assert found.other["prose"].documents == 1
    assert set(found.distance) == {"code", "prose"}
    assert {name: grid.samples for name, grid in found.grids.items()} == {
        "mqar": 2 * 3,
        "copying": 2 * 56,
    }
    assert found.grids["mqar"].beyond > 0
    assert [entry.length for entry in found.efficiency] == [160]
    assert found.niah is None
    assert {"perplexity", "by distance", "mqar", "copying", "efficiency"} <= set(seen)
    result = EvaluationResult({"rosa": found}, describe_environment(), 0, 1.0)
    again = EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result


def test_needles_of_all_kinds(monkeypatch):
    from tests.evaluate.test_niah import Letters

    plan = dataclasses.replace(
        PLAN, suites=("niah", "niah_multi", "niah_confusable"), lengths=(900,), depths=(0.5,),
        samples=3, limit=1, distractors=2,
    )  # fmt: skip
    found = measure_variant(build(depth=1, vocab_size=256), Letters(), plan)
    assert found.niah.samples == 1  # the limit
    assert {n: g.samples for n, g in found.grids.items()} == {"niah_multi": 1, "niah_confusable": 1}


def test_an_interrupted_evaluation_goes_on(tmp_path):
    whole = measure_variant(model(), texts.tokenizer(), PLAN)

    class Interrupted(Exception):
        pass

    def stop(what, done, total):
        if what == "mqar":
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_variant(model(), texts.tokenizer(), PLAN, parts=tmp_path, progress=stop)
    kept = {path.name for path in tmp_path.glob("*.json")}
    assert "perplexity-code.json" in kept
    assert "mqar.json" not in kept
    (tmp_path / "distance-prose.json").write_text('{"plan": "cut')  # measured again
    seen = []
    found = measure_variant(
        model(), texts.tokenizer(), PLAN, parts=tmp_path, progress=lambda *s: seen.append(s[0])
    )
    assert "perplexity" not in seen
    assert seen.count("by distance") == 1  # the damaged one
    same = dataclasses.replace(whole, efficiency=())
    assert dataclasses.replace(found, efficiency=()) == same
    # Another plan shares nothing with it.
    other = dataclasses.replace(PLAN, seed=1, suites=("perplexity",))
    again = []
    measure_variant(
        model(), texts.tokenizer(), other, parts=tmp_path, progress=lambda *s: again.append(s[0])
    )
    assert "perplexity" in again


def test_unknown_suites_and_limits_are_refused():
    with pytest.raises(InvalidInputError, match="no suite named nonsense; there are perplexity"):
        dataclasses.replace(PLAN, suites=("nonsense",))
    with pytest.raises(InvalidInputError, match="limit must be at least 1"):
        dataclasses.replace(PLAN, limit=0)
    assert len(set(SUITES)) == len(SUITES)
