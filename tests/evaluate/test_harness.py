"""Public tasks run offline on a model object: local files of their format, and RULER's own."""

from __future__ import annotations

import importlib.util
import json

import pytest

from rosakit.errors import DataError, InvalidInputError
from rosakit.evaluate.harness import RULER, harness
from rosakit.tuning import RosaConfig, attach
from tests.tuning import texts
from tests.tuning.tiny import build

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ROWS = {
    "hellaswag": {"ind": 1, "activity_label": "w1", "ctx_a": "w2 w3", "ctx_b": "w4 w5",
                  "ctx": "w2 w3 w4 w5", "endings": ["w1", "w2", "w3", "w4"], "label": "2"},
    "lambada_openai": {"text": "w1 w2 w3 w4 w5"},
    "piqa": {"goal": "w1 w2", "sol1": "w3", "sol2": "w4", "label": 1},
    "sciq": {"question": "w1", "support": "w2 w3", "distractor1": "w4", "distractor2": "w5",
             "distractor3": "w6", "correct_answer": "w7"},
    "winogrande": {"sentence": "w1 _ w2", "option1": "w3", "option2": "w4", "answer": "1"},
    "mmlu_anatomy": {"question": "w1 w2", "choices": ["w3", "w4", "w5", "w6"], "answer": 3},
    "longbench_2wikimqa": {"context": "w1 w2 w3", "question": "w4", "answers": ["w5"],
                           "all_classes": [], "input": "w4"},
}  # fmt: skip


def model():
    return attach(build(depth=1), RosaConfig(window=8, adapters=False, token_route=True))


def test_every_public_set_is_read_from_a_local_file(tmp_path):
    local, rows = {}, dict(ROWS)
    if not all(importlib.util.find_spec(name) for name in ("jieba", "fuzzywuzzy", "rouge")):
        with pytest.raises(InvalidInputError, match="needs more packages"):
            harness(model(), texts.tokenizer(), ["longbench_2wikimqa"])
        del rows["longbench_2wikimqa"]
    for task, row in rows.items():
        local[task] = tmp_path / f"{task}.jsonl"
        local[task].write_text("\n".join([json.dumps(row)] * 8))
    scores = harness(model(), texts.tokenizer(), list(rows), local=local, limit=2)
    assert set(scores) == set(rows)
    assert all(0 <= value <= 1 for value in scores.values())


def test_what_cannot_be_run_is_said(tmp_path):
    with pytest.raises(InvalidInputError, match="knows no task named nonsense"):
        harness(model(), texts.tokenizer(), ["nonsense"])
    with pytest.raises(InvalidInputError, match="no tasks"):
        harness(model(), texts.tokenizer(), [])
    with pytest.raises(DataError, match="no such file"):
        harness(model(), texts.tokenizer(), ["piqa"], local={"piqa": tmp_path / "none.jsonl"})


@pytest.mark.slow
def test_ruler_generates_its_own(tmp_path):
    pytest.importorskip("wonderwords", reason="RULER needs wonderwords")
    scores = harness(model(), texts.tokenizer(), [RULER], lengths=(512,), limit=2)
    assert set(scores) == {f"{RULER}/512"}
