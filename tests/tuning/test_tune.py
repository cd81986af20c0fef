"""tune(): it learns what retrieval explains, resumes exactly, and never loses or fakes a result."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError, InvalidTypeError
from rosakit.tuning import RosaConfig, attach, rosa_parameters
from rosakit.tuning.lora import lora_parameters
from rosakit.tuning.loss import LossModel
from rosakit.tuning.result import load_result
from rosakit.tuning.sealed import last_checkpoint
from rosakit.tuning.sealed import seal as seal_folder
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.stages import parameter_groups
from rosakit.tuning.train import tune
from rosakit.tuning.trainer import RosaTrainer
from tests.tuning.texts import corpus, model, tokenizer
from tests.tuning.tiny import tokens

ROUTE = RosaConfig(window=16, sink_tokens=2, adapters=False, token_route=True)
EVERYTHING = RosaConfig(window=16, sink_tokens=2, adapters=True, layers=(1,), token_route=True)


def run(output, **options):
    settings = {
        "length": 96,
        "steps": 12,
        "batch_size": 2,
        "rosa": ROUTE,
        "log_every": 4,
        "save_every": 4,
        "eval_blocks": 4,
        "device": "cpu",
    }
    config = TuneConfig(output=output, **{**settings, **options})
    return tune(config, model=model(), tokenizer=tokenizer(), documents=corpus(), show=False)


def trained(model):
    return {**rosa_parameters(model), **lora_parameters(model)}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(p, other[n]) for n, p in one.items())


def test_learns_to_copy_where_its_control_does_not(tmp_path):
    options = {"steps": 25, "lr_token_route": 5e-2, "save_every": 0}
    rosa = run(tmp_path / "rosa", **options)
    control = run(tmp_path / "control", control=True, **options)
    assert rosa.losses[0] - rosa.metrics["train_loss"] > 0.7
    assert control.metrics["heldout_loss"] - rosa.metrics["heldout_loss"] > 0.7
    assert abs(control.losses[0] - control.metrics["train_loss"]) < 0.5
    assert rosa.metrics["parameters_trained"] == control.metrics["parameters_trained"]
    route = {"route_match_length", "route_null_rate", "route_beyond_window"}
    assert route <= rosa.metrics["health"].keys()
    assert rosa.metrics["health"]["hit_rate"] > 0.5 > control.metrics["health"]["hit_rate"]


def test_everything_trains_and_the_rest_stays(tmp_path):
    before = dict(model().state_dict())
    result = run(tmp_path / "run", rosa=EVERYTHING, lora_rank=2, steps=6)
    changed = {n for n, p in trained(result.model).items() if p.requires_grad}
    assert changed == set(trained(result.model))
    after = {n.replace(".base_layer", ""): t for n, t in result.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {"match_rate", "entropy_worst", "flip_change", "gate"} <= result.metrics["health"].keys()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with checkpoints at 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run(folder, rosa=EVERYTHING, lora_rank=2, accumulate=2)


def continued(finished, folder, **options):
    shutil.copytree(finished.output, folder)
    return lambda: run(folder, rosa=EVERYTHING, lora_rank=2, accumulate=2, resume=True, **options)


def test_resuming_gives_the_uninterrupted_run(finished, tmp_path):
    again = continued(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-12")
    (tmp_path / "run/checkpoints/.partial/checkpoint-12").mkdir(parents=True)
    torch.rand(7)  # the state of the process before a continuation does not matter
    result = again()
    assert result.losses == finished.losses
    assert len(result.losses) == result.steps == 12
    assert same(trained(result.model), trained(finished.model))
    assert result.metrics["heldout_loss"] == finished.metrics["heldout_loss"]


def test_a_finished_run_resumes_to_itself(finished, tmp_path):
    again = continued(finished, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/checkpoint-12"
    values = json.loads((folder / "losses.json").read_text())
    (folder / "losses.json").write_text(json.dumps({**values, "seconds": 1000.0}))
    seal(folder)
    result = again()
    # Time adds up over continuations.
    assert 1000 < result.metrics["seconds"] < 1100
    assert result.losses == finished.losses
    assert same(trained(result.model), trained(finished.model))


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter", "losses.json", "seal.json"])
def test_a_corrupt_checkpoint_is_refused(finished, tmp_path, file):
    again = continued(finished, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/checkpoint-12"
    path = next(folder.glob(f"{file}*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if file == "seal.json" else data)
    with pytest.raises(CheckpointError, match=r"corrupt.*delete it"):
        again()
    shutil.rmtree(folder)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-8"


def test_only_the_same_run_is_resumed(finished, tmp_path):
    again = continued(finished, tmp_path / "run", lr=1e-5)
    with pytest.raises(CheckpointError, match="other lr;"):
        again()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(tmp_path / "elsewhere", resume=True)
    with pytest.raises(InvalidInputError, match=r"already holds a run .*resume"):
        run(finished.output)


# What torch.save and plain writes say on a full disk.
FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
]


@pytest.mark.parametrize("error", FULL)
def test_no_space_for_a_checkpoint_loses_nothing(tmp_path, monkeypatch, error):
    save = torch.save

    def full(what, path, *args, **kwargs):
        if "checkpoint-8" in str(path):
            raise error
        return save(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot save a checkpoint.*resume"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert len(run(tmp_path / "run", resume=True).losses) == 12


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(InvalidInputError, match=r"loss is nan at step [48]; lower the learning"):
        run(tmp_path / "run", rosa=EVERYTHING, lr=1e30, max_grad_norm=0.0, warmup=0.0)


def test_result_on_disk_is_the_trained_model(finished, tmp_path):
    files = {path.name for path in finished.output.iterdir()}
    assert {"README.md", "metrics.json", "tune.json", "rosa_config.json", "lora.json"} <= files
    metrics = json.loads((finished.output / "metrics.json").read_text())
    assert metrics["losses"] == finished.losses
    size = sum(p.stat().st_size for p in finished.output.glob("*.safetensors"))
    assert size < 4 * metrics["parameters_trained"] + 40_000
    card = (finished.output / "README.md").read_text()
    assert "from rosakit.tuning import load_result" in card
    assert f"{metrics['heldout_loss']:.4f}" in card

    base = tmp_path / "base"
    model().save_pretrained(base)
    tokenizer().save_pretrained(base)
    loaded, _, config = load_result(finished.output, base=str(base), device="cpu")
    assert config.lora_rank == 2
    ids = tokens(1, 50)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, finished.model.eval()(ids).logits)

    half = shutil.copytree(finished.output, tmp_path / "half")
    next(half.glob("adapter-*")).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_result(half, base=str(base), device="cpu")
    with pytest.raises(CheckpointError, match="no result of rosakit tune"):
        load_result(base)


def seal(folder):
    """Record digests anew, as if the files had been saved like that."""
    (folder / "seal.json").unlink()
    seal_folder(folder)


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a bare model on blocks with different numbers of labels."""
    wrapped = LossModel(attach(model(), ROUTE), None)
    blocks = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(3, 24)]
    blocks[0]["labels"][3:] = -100
    for block in blocks:
        block["position_ids"] = torch.arange(24)
    config = TuneConfig(output=tmp_path / "run", rosa=ROUTE, device="cpu")
    return RosaTrainer(
        wrapped,
        config,
        steps=1,
        train_blocks=blocks,
        eval_blocks=blocks,
        identity={},
        callbacks=[],
    )


def test_loss_scale_of_several_processes(trainer, monkeypatch):
    """DDP averages gradients, so each process counts its labels once for every process."""
    inputs = {name: x[None] for name, x in trainer.train_dataset[1].items()}
    alone = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=46)
    mean = trainer.compute_loss(trainer.model, inputs)
    assert alone.item() == pytest.approx(mean.item() / 2)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    shared = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=46)
    assert shared.item() == pytest.approx(mean.item())
    assert trainer.compute_loss(trainer.model, inputs).item() == mean.item()


def test_heldout_loss_weighs_tokens_not_batches(trainer):
    found = trainer.evaluate()["eval_loss"]
    pairs = []
    for block in trainer.eval_dataset:
        with torch.no_grad():
            out = trainer.model(**{name: x[None] for name, x in block.items()})
        pairs.append((out["loss"].item(), int(out["tokens"])))
    assert [n for _, n in pairs] == [2, 23, 23]
    assert found == pytest.approx(sum(x * n for x, n in pairs) / 48)
    assert trainer.state.log_history[-1]["eval_loss"] == found


def test_learning_rates(finished):
    config = TuneConfig(rosa=EVERYTHING, lora_rank=2, lr=1.0, lr_lora=3.0, lr_token_route=5.0)
    groups = parameter_groups(finished.model, config)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    names = {n: rates[id(p)] for n, p in trained(finished.model).items()}
    assert {r for n, r in names.items() if "w_q.weight" in n and "layers.1." in n[:9]} == {0.1}
    assert names["layers.1.projections.w_v.weight"] == 1.0
    assert names["token_route.keep_bias"] == 5.0
    assert {r for n, r in names.items() if ".lora_" in n} == {3.0}


def test_refuses_what_it_would_spoil(tmp_path):
    used = attach(model(), ROUTE)
    config = TuneConfig(output=tmp_path / "run", steps=1, length=32, rosa=ROUTE)
    with pytest.raises(InvalidInputError, match="plain LlamaForCausalLM"):
        tune(config, model=used, tokenizer=tokenizer(), documents=corpus(), show=False)
    with pytest.raises(InvalidInputError, match="tokenizer"):
        tune(config, model=model(), documents=corpus(), show=False)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, InvalidInputError, "steps must be at least 1"),
        ({"steps": 1, "tokens": 1}, InvalidInputError, "not both"),
        ({"length": 1}, InvalidInputError, "length"),
        ({"lr": "fast"}, InvalidTypeError, "lr must be a number, got 'fast'"),
        ({"lr": -1.0}, InvalidInputError, "lr must be at least 0"),
        ({"lr": math.inf}, InvalidTypeError, "lr must be a finite number"),
        ({"lr": True}, InvalidTypeError, "lr must be a number"),
        ({"lora_alpha": "big"}, InvalidTypeError, "lora_alpha must be a number or none"),
        ({"lora_alpha": -1}, InvalidInputError, "lora_alpha must be above 0"),
        ({"warmup": 1.5}, InvalidInputError, "warmup must be at most 1"),
        ({"model": 3}, InvalidTypeError, "model must be text, got 3"),
        ({"output": None}, InvalidTypeError, "output must be text, got None"),
        ({"device": 3}, InvalidTypeError, "device must be text"),
        ({"gguf_file": 3}, InvalidTypeError, "gguf_file must be text or none"),
        ({"rosa": 3}, InvalidTypeError, "rosa must be a mapping of the fields of RosaConfig or"),
        ({"rosa": {"estimator": "guess"}}, InvalidInputError, "unknown estimator 'guess'"),
        ({"data": None}, InvalidTypeError, "sources must be a name or a list of names"),
        ({"batch_size": 1.5}, InvalidTypeError, "batch_size must be an integer"),
        ({"schedule": "steps"}, InvalidInputError, "schedule must be one of cosine"),
        ({"rosa": None}, InvalidInputError, "nothing to train"),
        ({"rosa": {"token_route": False}}, InvalidInputError, "nothing to train"),
        ({"rosa": {"windw": 3}}, InvalidInputError, "did you mean 'window'"),
        ({"data": {"source": "x"}}, InvalidInputError, "did you mean 'sources'"),
    ],
)
def test_bad_settings(options, error, said):
    with pytest.raises(error, match=said):
        TuneConfig(**options)


def test_settings_survive_json():
    config = TuneConfig(model="m", data="a.txt", rosa={"window": 7}, lr="1e-3", steps=3)
    assert config.rosa == RosaConfig(window=7, adapters=False, token_route=True)
    assert config.lr == 1e-3
    again = TuneConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


# Interrupts, on the command line as users meet them.


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a tiny model and texts, as the command line takes them."""
    folder = tmp_path_factory.mktemp("project")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for index, document in enumerate(corpus().train):
        (folder / f"texts/{index:02}.txt").write_text(document.text)
    return folder


def settings(project, output):
    return TuneConfig(
        model=str(project / "model"),
        data=str(project / "texts"),
        output=output,
        length=64,
        steps=300,
        rosa=ROUTE,
        save_every=5,
        keep_checkpoints=100,
        eval_blocks=1,
        device="cpu",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_go_on_exactly(project, tmp_path, number):
    config = settings(project, str(tmp_path / "run"))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "rosakit.cli", "tune", str(path), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while last_checkpoint(config.output) is None:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        said = process.stderr.read()
    reached = int(last_checkpoint(config.output).name.removeprefix("checkpoint-"))
    assert reached < 300
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in said
        assert "Traceback" not in said
        assert f"stopped at step {reached}" in said
        assert "Unfinished" in (Path(config.output) / "README.md").read_text()
        load_result(config.output)
    # The rest is cut short here: what counts is that the losses go on as they would have.
    short = settings(project, str(tmp_path / "whole"))
    checkpoint = last_checkpoint(config.output)
    losses = json.loads((checkpoint / "losses.json").read_text())["losses"]
    assert len(losses) == reached
    resumed = _until(config, reached + 10, resume=True)
    whole = _until(short, reached + 10)
    assert resumed == whole
    assert whole[:reached] == losses


def _until(config, step, **changes):
    """Losses of a run that is asked to stop at a step."""
    import dataclasses

    from rosakit.tuning import trainer

    stop = trainer.StopCallback.on_step_end

    def at(self, args, state, control, **kwargs):
        self.asked = state.global_step >= step
        stop(self, args, state, control, **kwargs)

    trainer.StopCallback.on_step_end = at
    try:
        result = tune(dataclasses.replace(config, **changes), show=False)
    finally:
        trainer.StopCallback.on_step_end = stop
    assert result.interrupted
    return result.losses
