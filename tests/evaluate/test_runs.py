"""`rosakit eval` compares runs trained alike, on texts that none of them trained on."""

from __future__ import annotations

import dataclasses

import pytest

from rosakit.errors import DataError, InvalidInputError
from rosakit.evaluate.runs import _check_alike, _describe, _is_control, _texts
from rosakit.tuning import RosaConfig
from rosakit.tuning.data import DataConfig
from rosakit.tuning.settings import TuneConfig

RUN = TuneConfig(
    model="m", rosa=RosaConfig(window=64, adapters=False, token_route=True), output="a", steps=5
)


@pytest.mark.parametrize(
    "changes, may_differ, named",
    [
        ({"control": True, "output": "b", "log_every": 3, "resume": True}, ("control",), None),
        ({"control": True, "steps": 1}, ("control",), "steps: 5 and 1"),
        ({"control": True, "seed": 7}, ("control",), "seed: 0 and 7"),
        ({"control": True}, (), "control"),
        (
            {"rosa": dataclasses.replace(RUN.rosa, window=32)},
            ("control",),
            "rosa.window: 64 and 32",
        ),
        ({"rosa": dataclasses.replace(RUN.rosa, window=None)}, ("rosa.window",), None),
        ({"rosa": None, "lora_rank": 4}, ("rosa.window",), "lora_rank: 0 and 4"),
    ],
)
def test_only_runs_trained_alike_are_compared(changes, may_differ, named):
    other = dataclasses.replace(RUN, **changes)
    if named is None:
        _check_alike("a", RUN, "b", other, may_differ=may_differ)
        return
    with pytest.raises(InvalidInputError, match="b was not trained like a") as caught:
        _check_alike("a", RUN, "b", other, may_differ=may_differ)
    assert named in str(caught.value)


def test_texts_of_the_training_are_left_out(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 20)
    trained = (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    config = dataclasses.replace(RUN, data=DataConfig(sources=trained, heldout_share=0.0))
    texts, dropped = _texts(config, [str(tmp_path)])
    assert [t.text[:6] for t in texts] == ["text c", "text d"]
    assert dropped == 2
    with pytest.raises(DataError, match="trained on all 2 texts"):
        _texts(config, trained)


def test_whatever_retrieves_is_no_control():
    def run(**rosa):
        config = RosaConfig(**{"window": 64, "adapters": False, **rosa})
        return dataclasses.replace(RUN, rosa=config, lora_rank=4)

    assert _is_control(run())
    assert _is_control(run(recall=4, retrieve=False))
    for rosa in ({"recall": 4}, {"token_route": True}, {"adapters": True}):
        assert not _is_control(run(**rosa))
    assert _describe(run(recall=4)) == "window 64, 4 recalled spans, LoRA of rank 4"
