"""Options that move with training: the function, the callback, the configuration, the flags."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from rosakit.cli import main
from rosakit.errors import InvalidInputError
from rosakit.ops.estimators import names
from rosakit.tuning import RosaConfig
from rosakit.tuning.attach import adapters_of
from rosakit.tuning.schedules import Schedule, read_schedules
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, model, tokenizer

# One option of every estimator, as it is typed.
TYPED = {
    "bitflip": ("stride=8", {"stride": 8}),
    "counterfactual": ("temperature=2.0", {"temperature": 2.0}),
    "soft_dp": ("tau=0.4,straight_through=true", {"tau": 0.4, "straight_through": True}),
    "soft_scan": ("{tau: 0.4}", {"tau": 0.4}),
    "suffix_attention": ("scale=2,window=8", {"scale": 2, "window": 8}),
}


@pytest.mark.parametrize(
    ("shape", "middle"), [("geometric", 0.1), ("linear", 0.505), ("cosine", 0.505), ("constant", 1)]
)
def test_values_between_the_ends(shape, middle):
    schedule = Schedule(1.0, 0.01, shape, begin=0.2, until=0.6)
    assert [schedule.at(step, 100) for step in (0, 20)] == [1.0, 1.0]
    assert schedule.at(40, 100) == pytest.approx(middle)
    last = 1.0 if shape == "constant" else 0.01
    assert [schedule.at(step, 100) for step in (60, 99, 100)] == pytest.approx([last] * 3)
    values = [schedule.at(step, 100) for step in range(100)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 0.0, "end": 1.0}, "positive ends"),
        ({"start": 1.0, "end": 0.5, "begin": 0.5, "until": 0.5}, "begin < until"),
        ({"start": 1.0, "end": 0.5, "shape": "steps"}, "shape must be one of"),
    ],
)
def test_schedules_that_make_no_sense(options, said):
    with pytest.raises(InvalidInputError, match=said):
        Schedule(**options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"speed": {"start": 1.0, "end": 0.5}}, "does not take speed"),
        ({"tau": 0.5}, "must be a mapping with start and end"),
        ({"tau": {"start": 1.0}}, "must be a mapping with start and end"),
        ({"tau": {"start": 1.0, "end": "low"}}, "must have numbers"),
    ],
)
def test_configurations_that_make_no_sense(given, said):
    with pytest.raises(InvalidInputError, match=said):
        read_schedules("soft_dp", given)
    with pytest.raises(InvalidInputError, match=said):
        TuneConfig(rosa=RosaConfig(estimator="soft_dp"), estimator_schedules=given)


def test_schedules_need_adapters():
    with pytest.raises(InvalidInputError, match="move options of the adapters"):
        TuneConfig(estimator_schedules={"temperature": {"start": 1.0, "end": 2.0}})


def config(output, **changes):
    rosa = RosaConfig(window=16, sink_tokens=2, layers=(1,), estimator="soft_dp")
    settings = {
        "length": 48,
        "steps": 6,
        "rosa": rosa,
        "estimator_schedules": {"tau": {"start": 1.0, "end": 0.25, "until": 0.5}},
        "save_every": 2,
        "log_every": 1,
        "eval_blocks": 1,
        "device": "cpu",
    }
    return TuneConfig(output=str(output), **{**settings, **changes})


def test_the_trainer_moves_the_option_and_a_resumed_run_goes_on_with_it(tmp_path, monkeypatch):
    seen, measured = [], set()
    from rosakit.ops.estimators import registry, soft_dp

    @functools.wraps(soft_dp.soft_dp)
    def watched(*args, **options):
        if torch.is_grad_enabled():
            seen.append(options["tau"])
        else:
            measured.add(options["tau"])
        return soft_dp.soft_dp(*args, **options)

    monkeypatch.setitem(registry._estimators, "soft_dp", watched)

    def run(folder, **changes):
        seen.clear()
        from rosakit.tuning import trainer

        stop_at = changes.pop("stop_at", None)
        whole = trainer.StopCallback.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            self.asked = stop_at is not None and state.global_step >= stop_at
            whole(self, args, state, control, **kwargs)

        monkeypatch.setattr(trainer.StopCallback, "on_step_end", on_step_end)
        result = tune(
            config(folder, **changes),
            model=model(),
            tokenizer=tokenizer(),
            documents=corpus(),
            show=False,
        )
        monkeypatch.setattr(trainer.StopCallback, "on_step_end", whole)
        return result, [tau for n, tau in enumerate(seen) if n == 0 or tau != seen[n - 1]]

    whole, taus = run(tmp_path / "whole")
    assert taus == pytest.approx([1.0, 0.25 ** (1 / 3), 0.25 ** (2 / 3), 0.25])
    assert measured == {None}  # evaluations read hard, as decoding does
    first, some = run(tmp_path / "parts", stop_at=2)
    assert first.interrupted
    assert some[:2] == pytest.approx(taus[:2])
    rest, others = run(tmp_path / "parts", resume=True)
    assert others == pytest.approx(taus[2:])
    assert rest.losses == whole.losses
    for one, other in zip(
        adapters_of(rest.model).values(), adapters_of(whole.model).values(), strict=True
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
        )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for index, document in enumerate(corpus().train):
        (folder / f"texts/{index:02}.txt").write_text(document.text)
    return folder


@pytest.mark.parametrize("flag", ["--estimator-options", "--estimator-option"])
@pytest.mark.parametrize("estimator", names())
def test_every_estimator_trains_from_the_command_line(project, tmp_path, estimator, flag):
    if flag == "--estimator-option" and estimator != "soft_dp":
        pytest.skip("one estimator is enough for the singular")
    typed, options = TYPED[estimator]
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *("tune", "--model", str(project / "model"), "--data", str(project / "texts")),
                *("--output", str(tmp_path / "run"), "--quiet", "--device", "cpu"),
                *("--length", "32", "--steps", "2", "--save-every", "0", "--eval-blocks", "1"),
                *("--adapters", "--layers", "1", "--window", "8", "--bits", "4"),
                *("--estimator", estimator, flag, typed),
            ]
        )
    assert caught.value.code == 0
    saved = json.loads((tmp_path / "run/tune.json").read_text())
    assert saved["rosa"]["estimator"] == estimator
    assert saved["rosa"]["estimator_options"] == options
