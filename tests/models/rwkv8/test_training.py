"""Training runs: they learn, they resume exactly, they refuse what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError, RosakitError
from rosakit.models import rwkv8
from rosakit.models.rwkv8.training import TrainConfig, Trainer, make_model

TINY = {
    "count": {"channels": 8, "length": 24},
    "reverse": {"channels": 16, "digits": 3, "length": 10},
    "arithmetic": {"channels": 16, "digits": 2, "length": 12},
}


def config(task="count", **options):
    defaults = {"task": task, "steps": 6, "batch": 4, **TINY[task]}
    return TrainConfig(**{**defaults, **options})


@pytest.mark.parametrize("task", sorted(TINY))
def test_every_task_trains(task, tmp_path):
    seen = []
    result = Trainer(config(task), tmp_path / "run").run(seen.append)
    assert [p.step for p in seen] == list(range(1, 7))
    assert seen[0].learning_rate == 1e-3
    assert seen[-1].learning_rate < 1e-4
    assert result.losses == [p.loss for p in seen]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["validation_loss"] == result.validation_loss
    assert stored["config"]["task"] == task
    again = rwkv8.load(tmp_path / "run")
    assert again.config == make_model(result.config, Trainer(config(task)).task).config


def test_token_memory_learns_to_count():
    """Without a ROSA layer, 150 steps take the loss well below that of guessing (ln 11 = 2.4)."""
    result = Trainer(
        TrainConfig(layers=0, steps=150, batch=16, length=64, learning_rate=1e-2)
    ).run()
    assert result.final_loss < 1.1
    assert result.validation_loss == pytest.approx(result.final_loss, abs=0.25)
    assert set(result.by_length.by_size) == {1, 2, 3}
    assert result.demo.share > 0.6


@pytest.mark.parametrize("task", ["count", "reverse"])
def test_resuming_repeats_the_unbroken_run(task, tmp_path):
    whole = Trainer(config(task)).run()

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        Trainer(config(task), tmp_path).run(stop, save_every=3)
    second = Trainer(config(task), tmp_path, resume=True)
    assert second.step == 3
    result = second.run()
    assert result.losses == whole.losses
    assert result.validation_loss == whole.validation_loss


def test_a_folder_is_not_overwritten(tmp_path):
    Trainer(config(), tmp_path).run()
    with pytest.raises(CheckpointError, match="holds a run already"):
        Trainer(config(), tmp_path)
    with pytest.raises(CheckpointError, match="holds a run with seed=0"):
        Trainer(config(seed=1), tmp_path, resume=True)
    (tmp_path / "trainer.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Trainer(config(), tmp_path, resume=True)


def test_the_control_has_no_rosa():
    model = make_model(config("reverse", rosa=False), Trainer(config("reverse")).task)
    assert not any("rosa" in name for name, _ in model.named_parameters())
    with pytest.raises(InvalidInputError, match="layers=0"):
        Trainer(config(rosa=False))


def test_diverging_is_said(monkeypatch):
    trainer = Trainer(config())
    with torch.no_grad():
        trainer.model.o.weight.fill_(float("nan"))
    with pytest.raises(RosakitError, match="loss is nan at step 1"):
        trainer.run()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": "magic"}, "unknown estimator 'magic'"),
        ({"steps": 0}, "at least 1"),
        ({"bits": 3}, "1 or 4 bits"),
        ({"layers": -1}, "not be negative"),
        ({"task": "reverse", "layers": 0, "digits": 3, "length": 10}, "at least one layer"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InvalidInputError, match=message):
        Trainer(TrainConfig(**{**dataclass_defaults(), **options}))


def dataclass_defaults():
    return {"channels": 8, "steps": 2, "batch": 2}
