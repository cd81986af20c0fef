"""A plan says what the run then does."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rosakit.cli.app import build
from rosakit.tuning.plan import plan_run
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.test_stages import ROSA
from tests.tuning.texts import corpus, model, tokenizer


@pytest.fixture
def project(tmp_path):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for index, document in enumerate(corpus().train):
        (tmp_path / f"texts/{index:02}.txt").write_text(document.text)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"base_from": 0.5}, {"steps": 3}])
def test_plan_and_run_agree(project, options):
    config = TuneConfig(
        model=str(project / "model"),
        data={"sources": str(project / "texts"), "heldout_share": 0.0},
        output=project / "run",
        **{"length": 512, "rosa": ROSA, "device": "cpu", **options},
    )
    plan = plan_run(config)
    result = tune(config, show=False)
    assert plan.steps == result.steps
    assert plan.tokens == result.metrics["tokens"]
    assert plan.parameters == result.metrics["parameters"]
    assert plan.trained == result.metrics["parameters_trained"]
    assert plan.memory["weights"] == 4 * plan.parameters
    assert plan.memory["gradients"] == 4 * plan.trained
    assert plan.seconds > 0
    json.dumps(plan.to_dict())


def test_checkpointing_and_a_lone_token_route_need_less_memory(project):
    def activations(**options):
        config = TuneConfig(
            model=str(project / "model"), length=512, steps=2, device="cpu", **options
        )
        return plan_run(config).memory["activations"]

    whole = activations(rosa=ROSA)
    assert activations(rosa=ROSA, gradient_checkpointing=True) < whole
    assert activations() < whole  # the default trains the token route alone


def test_dry_run_trains_nothing(project):
    arguments = ["tune", "--model", str(project / "model"), "--data", str(project / "texts")]
    arguments += ["--output", str(project / "run"), "--length", "128", "--dry-run"]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code == 0, done.output
    for word in ("parameters", "steps", "memory", "time"):
        assert word in done.output
    assert not (project / "run").exists()
