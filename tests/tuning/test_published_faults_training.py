"""Faults of public ROSA code that concern training; others: tests/test_published_faults.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rosakit import RosaPeftConfig
from rosakit.errors import CheckpointError
from rosakit.tuning import RosaConfig, attach, load_adapter, rosa_parameters, save_adapter
from rosakit.tuning.sealed import last_checkpoint
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, model, tokenizer
from tests.tuning.tiny import build

ROSA = RosaConfig(window=16, sink_tokens=2, layers=(1,), token_route=True)


def test_fault_6_a_failed_load_prints_a_line_and_goes_on_with_random_adapters(tmp_path):
    """Here it raises, and nothing of the model has changed."""
    attached = attach(build(), RosaConfig(window=9))
    save_adapter(attached, tmp_path / "own")
    next((tmp_path / "own").glob("*.safetensors")).write_bytes(b"half a file")
    plain = build()
    before = plain.state_dict()
    with pytest.raises(CheckpointError, match="truncated or half-written"):
        load_adapter(plain, tmp_path / "own")
    assert before.keys() == plain.state_dict().keys()
    other = attach(build(), RosaConfig(window=9))
    kept = {n: p.detach().clone() for n, p in rosa_parameters(other).items()}
    with pytest.raises(CheckpointError):
        load_adapter(other, tmp_path / "own")
    assert all(torch.equal(p, kept[n]) for n, p in rosa_parameters(other).items())


def test_fault_6_through_peft(tmp_path):
    get_peft_model(build(), RosaPeftConfig(window=9)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if ".layers.1." not in n}, path)
    with pytest.raises(CheckpointError, match="tensors missing"):
        PeftModel.from_pretrained(build(), tmp_path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for index, document in enumerate(corpus().train):
        (folder / f"texts/{index:02}.txt").write_text(document.text)
    return folder


def settings(project, output, **changes):
    values = {
        "model": str(project / "model"),
        "data": str(project / "texts"),
        "output": str(output),
        "length": 48,
        "steps": 60,
        "base_from": 0.5,
        "lr_base": 1e-3,
        "rosa": ROSA,
        "log_every": 1,
        "save_every": 3,
        "keep_checkpoints": 3,
        "eval_blocks": 1,
        "device": "cpu",
    }
    return TuneConfig(**{**values, **changes})


def history(result):
    """Loss, stage and learning rate of each step."""
    entries = [e for e in result.metrics["history"] if "loss" in e]
    return [(e["step"], e["loss"], e["stage"], e["learning_rate"]) for e in entries]


def test_fault_7_resuming_restarts_the_learning_rate_stages(project, tmp_path):
    """Here a run that is killed at random, twice, ends as the one that nobody disturbed."""
    whole = tune(settings(project, tmp_path / "whole"), show=False)
    output, generator = tmp_path / "killed", random.Random(20261122)
    reached = 0
    for attempt in range(2):
        config = settings(project, output, resume=attempt > 0)
        (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
        command = [
            sys.executable,
            "-m",
            "rosakit.cli",
            "tune",
            str(tmp_path / "run.json"),
            "--quiet",
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 120
            while (step := step_of(output)) <= reached:
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(generator.uniform(0.0, 0.4))  # somewhere in a step, or in a save
            process.kill()
        reached = step_of(output)
        assert step <= reached <= 60
    again = tune(settings(project, output, resume=True), show=False)
    assert again.losses == whole.losses
    assert history(again) == history(whole)
    assert {stage for _, _, stage, _ in history(again)} == {1, 2}
    wanted = dict(whole.model.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in again.model.named_parameters())


def step_of(output) -> int:
    found = last_checkpoint(output)
    return 0 if found is None else int(found.name.removeprefix("checkpoint-"))
