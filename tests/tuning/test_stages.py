"""Two stages: what learns when, at which rate, and that a resumed run is the unbroken one."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.tuning import RosaConfig, attach, rosa_parameters
from rosakit.tuning.base import base_parameters
from rosakit.tuning.result import load_result
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.stages import TwoStages, parameter_groups, rate_at
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, model, tokenizer
from tests.tuning.tiny import tokens

ROSA = RosaConfig(window=16, sink_tokens=2, layers=(1,), token_route=True)
SETTINGS = {
    "length": 64,
    "steps": 10,
    "base_from": 0.5,
    "lr_base": 1e-3,
    "lr": 1e-2,
    "rosa": ROSA,
    "log_every": 1,
    "save_every": 2,
    "keep_checkpoints": 9,
    "eval_blocks": 2,
    "device": "cpu",
}


def run(output, **options):
    config = TuneConfig(output=output, **{**SETTINGS, **options})
    return tune(config, model=model(), tokenizer=tokenizer(), documents=corpus(), show=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("stages") / "run")


def test_rates():
    of = {"warmup": 0.2, "schedule": "linear"}
    assert [rate_at(s, 10, **of) for s in (0, 1, 2, 6, 10)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    later = [rate_at(s, 20, begin=10, **of) for s in (0, 9, 10, 11, 12, 16)]
    assert later == [0.0, 0.0, 0.0, 0.5, 1.0, 0.5]
    assert rate_at(7, 10, warmup=0.0, schedule="constant") == 1.0
    assert rate_at(5, 10, warmup=0.0, schedule="cosine") == pytest.approx(0.5)


def saved(run, step):
    from safetensors.torch import load_file

    folder = run.output / f"checkpoints/checkpoint-{step}"
    adapter = next(folder.glob("adapter-*.safetensors"))
    return load_file(folder / "base.safetensors"), load_file(adapter)


def test_the_base_learns_in_the_second_stage_only(finished):
    start = {n: p.detach() for n, p in base_parameters(model()).items()}
    first, adapter = saved(finished, 4)
    assert all(torch.equal(first[name], tensor) for name, tensor in start.items())
    # The base's rate is 0 in the step at which it comes in.
    last, adapter_last = saved(finished, 10)
    assert all(not torch.equal(last[name], tensor) for name, tensor in start.items())
    assert not torch.equal(adapter["layers.1.e0"], adapter_last["layers.1.e0"])
    stages = [entry["stage"] for entry in finished.metrics["history"] if "loss" in entry]
    assert stages == [1] * 5 + [2] * 5


def test_groups_have_their_own_rates():
    attached = attach(model(), ROSA)
    config = TuneConfig(rosa=ROSA, lr=1.0, lr_base=2.0, lr_token_route=3.0, base_from=0.5)
    groups = parameter_groups(attached, config)
    rates = {id(p): (g["lr"], g["stage"]) for g in groups for p in g["params"]}
    assert {rates[id(p)] for p in base_parameters(attached).values()} == {(2.0, "base")}
    assert rates[id(rosa_parameters(attached)["layers.1.e0"])] == (1.0, "")
    assert len(rates) == len(list(attached.parameters()))
    frozen = parameter_groups(attached, TuneConfig(rosa=ROSA))
    assert not [g for g in frozen if g["stage"] == "base"]


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_resumed_in_either_stage_it_is_the_unbroken_run(finished, tmp_path, step):
    shutil.copytree(finished.output, tmp_path / "run")
    for folder in (tmp_path / "run/checkpoints").iterdir():
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    torch.rand(3)
    again = run(tmp_path / "run", resume=True)
    assert again.losses == finished.losses
    wanted = dict(finished.model.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in again.model.named_parameters())
    rates = [
        [e["learning_rate"] for e in r.metrics["history"] if "loss" in e] for r in (again, finished)
    ]
    assert rates[0] == rates[1]


def test_the_result_brings_the_trained_base_along(finished, tmp_path):
    base = tmp_path / "base"
    model().save_pretrained(base)
    tokenizer().save_pretrained(base)
    loaded, _, _ = load_result(finished.output, base=str(base), device="cpu")
    ids = tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, finished.model.eval()(ids).logits)
    broken = shutil.copytree(finished.output, tmp_path / "broken")
    data = bytearray((broken / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "base.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt"):
        load_result(broken, base=str(base), device="cpu")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tokens(1, 24, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def test_as_a_callback_of_any_trainer(tmp_path):
    """With the state of the callback in the checkpoint, as the Trainer stores it."""
    attached = attach(model(), ROSA)
    before = {n: p.detach().clone() for n, p in attached.named_parameters()}
    config = TuneConfig(rosa=ROSA, base_from=0.5, lr_base=1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(attached, config))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,
    )
    callback = TwoStages(0.5)
    trainer = Trainer(
        attached,
        arguments,
        train_dataset=Rows(),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.stage == 2
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["TwoStages"]
    assert stored == {"args": {"begin": 0.5}, "attributes": {"stage": 1}}
    changed = {n for n, p in attached.named_parameters() if not torch.equal(p, before[n])}
    assert {"model.layers.0.mlp.up_proj.weight", "rosa.token_route.keep_bias"} <= changed


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidInputError, match="lora_rank stands in"):
        TuneConfig(base_from=0.5, lora_rank=4)
    with pytest.raises(InvalidInputError, match="base_from must be below 1"):
        TuneConfig(base_from=1.0)
    with pytest.raises(InvalidInputError, match=r"share 0\.\.1"):
        TwoStages(2.0)


def test_zeros_fed_to_frozen_parameters_do_not_wear_off_adams_correction():
    """ZeRO gives the optimizer zeros for what is frozen; plain training gives it nothing."""

    def second_stage(feed_zeros):
        plain = attach(model(), ROSA)
        weight = next(iter(base_parameters(plain).values()))
        optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
        stages, state = TwoStages(0.5), SimpleNamespace(global_step=0, max_steps=40)
        wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
        stages.on_train_begin(None, state, None, model=plain, optimizer=wrapper)
        for state.global_step in range(25):
            stages.on_step_begin(None, state, None, model=plain, optimizer=wrapper)
            learns = state.global_step >= 20
            assert weight.requires_grad == learns
            if learns or feed_zeros:
                weight.grad = torch.full_like(weight, float(learns) * (state.global_step - 19))
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(second_stage(True), second_stage(False), rtol=0, atol=0)
