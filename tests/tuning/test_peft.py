"""ROSA as a method of peft: the same numbers as `attach`, by peft's own calls."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import rosakit
from rosakit import RosaConfig, RosaPeftConfig
from rosakit.errors import CheckpointError, InvalidInputError, UnsupportedModelError
from rosakit.tuning import attach, is_attached, rosa_parameters
from tests.tuning.tiny import FAMILIES, build, tokens

OPTIONS = {"window": 9, "sink_tokens": 3, "projection_rank": 4, "own_value": True}
FULL = {**OPTIONS, "token_route": True, "share_projections": True, "layers": (0, 2)}


def noisy(model, seed=1):
    """Perturb the active adapter, so that it matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrapped(family="llama", seed=1, **options):
    config = RosaPeftConfig(**{**OPTIONS, **options})
    return noisy(get_peft_model(build(family), config), seed).eval()


@torch.no_grad()
def logits(model, ids=None, **inputs):
    ids = tokens(2, 30) if ids is None else ids
    return model(input_ids=ids, **{"use_cache": False, **inputs}).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, FULL, {"inject": "pre_attn"}])
def test_it_computes_what_attach_computes(family, options):
    options = {**OPTIONS, **options}
    model = get_peft_model(build(family), RosaPeftConfig(**options))
    plain = attach(build(family), RosaConfig(**options))
    own = rosa_parameters(model.get_base_model())
    assert own.keys() == rosa_parameters(plain).keys()
    with torch.no_grad():
        for name, parameter in rosa_parameters(plain).items():
            parameter.copy_(own[name] + 0.1 * torch.randn_like(parameter))
            own[name].copy_(parameter)
    assert torch.equal(logits(model), logits(plain))
    ids = tokens(2, 20)
    one = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(one, plain.generate(ids, max_new_tokens=6, do_sample=False))


def test_only_the_adapter_trains():
    model = get_peft_model(build(), RosaPeftConfig(**FULL)).train()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in rosa_parameters(model.get_base_model()).values()}
    ids = tokens(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == sum(
        p.numel() for p in rosa_parameters(model.get_base_model()).values()
    )


@pytest.mark.parametrize("options", [{}, FULL])
def test_saved_and_loaded(tmp_path, options):
    model = wrapped(**options)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names
    assert all(".rosa" in name and "default" not in name for name in names)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "ROSA"
    wanted = {"window": 9, "sink_tokens": 3, "bits": 4, "estimator": "counterfactual"}
    assert wanted.items() <= stored.items()
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    further = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in further.parameters())
    lean = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), logits(model))


def test_several_adapters_with_windows_and_layers_of_their_own(tmp_path):
    one, other = wrapped(), wrapped(seed=2, **{**FULL, "window": 5})
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(build(), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(model), logits(one))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not [n for n in trainable if ".one." in n]
    with pytest.raises(InvalidInputError, match="cannot be active together"):
        model.base_model.set_adapter(["one", "other"])
    model.set_adapter("one")
    assert torch.equal(logits(model), logits(one))
    model.delete_adapter("one")
    assert torch.equal(logits(model), logits(other))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build(), tmp_path / "again/other")
    assert torch.equal(logits(again), logits(other))


def test_disabled_it_is_the_base_model():
    model, base = wrapped(**FULL), build()
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
        ids = tokens(1, 12)
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, base.generate(ids, max_new_tokens=4, do_sample=False))
    assert torch.equal(logits(model), before)


def test_unloaded_it_is_the_base_model_without_a_trace():
    base = wrapped(**FULL, lora_rank=2).unload()
    assert not is_attached(base)
    assert base.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(logits(base), logits(build()))
    hooks = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    attach(base, RosaConfig(**OPTIONS))  # and free for another use
    get_peft_model(build(), RosaPeftConfig(**OPTIONS))


def test_merging_is_refused_with_a_reason():
    model = wrapped()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedModelError, match=r"other positions.*unload\(\)"):
            merge()


def test_lora_beside_it(tmp_path):
    model = wrapped(lora_rank=2)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_A." in n and "self_attn" in n for n in names)
    assert not any(".lora_" in n and ".rosa" in n for n in names)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(build()))
    again.load_adapter(tmp_path, adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    again.set_adapter("default")
    assert not [n for n, p in again.named_parameters() if p.requires_grad and ".second" in n]


def test_lora_that_was_there_before_stays():
    base = build()
    base.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    alone = logits(base)
    model = get_peft_model(base, RosaPeftConfig(adapters=True, window=None))
    assert torch.equal(logits(model), alone)
    assert any(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_through_transformers_own_adapter_methods(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    base = build()
    base.load_adapter(tmp_path)
    assert torch.equal(logits(base), logits(model))
    base.disable_adapters()
    assert torch.equal(logits(base), logits(build()))
    base.enable_adapters()
    assert torch.equal(logits(base), logits(model))


def test_copies_are_independent():
    model = wrapped(**FULL)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    noisy(twin, 3)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    twin.disable_adapter_layers()
    assert torch.equal(logits(model), before)


def test_model_card_with_its_table_goes_through_saving(tmp_path):
    model = wrapped()
    model.peft_config["default"].evaluation = {
        "window + rosa": {"loss": 1.234567, "needles": "8/16"},
        "control": {"loss": 1.5},
    }
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    card = path.read_text()
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "import rosakit.tuning.peft" in card
    assert "| attention window | 9 tokens |" in card
    assert "| | loss | needles |" in card
    assert "| window + rosa | 1.235 | 8/16 |" in card
    assert "| control | 1.5 | – |" in card
    assert "[More Information Needed]" not in card
    path.write_text(card + "\nMy own words.\n")
    model.peft_config["default"].evaluation = {"loss": 1.0}
    model.save_pretrained(tmp_path)
    again = path.read_text()
    assert "| loss | 1 |" in again
    assert "needles" not in again
    assert "My own words." in again
    assert again.count("rosakit: begin") == 1
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert loaded.peft_config["default"].evaluation == {"loss": 1.0}


def test_pushing_to_a_hub(monkeypatch):
    """The usual call, with the hub's answers replaced."""
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    sent = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def create_branch(self, *args, **options): ...

        def create_commit(self, repo_id, operations, **options):
            assert repo_id == "someone/adapter"
            for operation in operations:
                with operation.as_file() as stream:
                    sent[operation.path_in_repo] = stream.read()

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: ModelCard("---\n---\n"))
    model = wrapped()
    model.push_to_hub("someone/adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(sent)
    assert json.loads(sent["adapter_config.json"])["window"] == 9


def test_loading_needs_the_import_and_the_card_says_so(tmp_path):
    wrapped().save_pretrained(tmp_path)
    code = (
        "import sys, peft\n"
        "if sys.argv[2] == 'with': import rosakit.tuning.peft\n"
        "print(type(peft.PeftConfig.from_pretrained(sys.argv[1])).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    good = subprocess.run([*command, "with"], capture_output=True, text=True, check=False)
    assert good.stdout.strip() == "RosaPeftConfig", good.stderr
    bad = subprocess.run([*command, "without"], capture_output=True, text=True, check=False)
    assert "KeyError: 'ROSA'" in bad.stderr


def test_a_mixture_of_methods_is_refused():
    with pytest.raises(ValueError, match="ROSA"):
        get_peft_model(build(), RosaPeftConfig(**OPTIONS), mixed=True)
    with pytest.raises(ValueError, match="different peft types"):
        wrapped().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_models_that_are_attached_already_are_refused():
    with pytest.raises(InvalidInputError, match=r"rosakit.detach\(model\) before"):
        get_peft_model(attach(build(), RosaConfig(**OPTIONS)), RosaPeftConfig(**OPTIONS))
    model = wrapped().get_base_model()
    with pytest.raises(InvalidInputError, match="attached already"):
        attach(model, RosaConfig(**OPTIONS))
    with pytest.raises(InvalidInputError, match=r"through peft; call unload\(\)"):
        rosakit.detach(model)


def test_configuration_is_checked_and_round_trips():
    config = RosaPeftConfig(window=7, layers=[1, 2], lora_rank=3)
    assert config.peft_type == peft.PeftType.ROSA
    assert config.task_type == peft.TaskType.CAUSAL_LM
    assert RosaPeftConfig.of(RosaConfig(window=7, layers=(1, 2)), lora_rank=3) == config
    with pytest.raises(InvalidInputError, match="window must be at least 1"):
        RosaPeftConfig(window=0)
    with pytest.raises(InvalidInputError, match="lora_rank must be at least 0"):
        RosaPeftConfig(lora_rank=-1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(sorted(t)[0]), r"1 tensors missing"),
        (lambda t: t.clear(), r"tensors missing"),
        (lambda t: t.update(foreign_rosa=torch.zeros(1)), r"1 tensors unknown \(foreign_rosa\)"),
        (lambda t: t.update({sorted(t)[0]: torch.zeros(3)}), r"of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, said):
    wrapped().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        PeftModel.from_pretrained(build(), tmp_path)


def test_modules_of_the_base_that_are_trained_and_saved_whole(tmp_path):
    model = wrapped(**FULL, modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    copies = {n for n in trainable if ".modules_to_save." in n}
    assert len(copies) == 1
    assert any("rosa" in name for name in trainable - copies)
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(1.5)
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert again.peft_config["default"].modules_to_save == ("lm_head",)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(again.unload()), logits(build()))
