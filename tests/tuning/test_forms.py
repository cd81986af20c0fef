"""Parameter-efficient forms: what they add, and that they learn, save and stream like the whole."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from rosakit.tuning import (
    RosaConfig,
    adapters_of,
    attach,
    freeze_base,
    load_adapter,
    rosa_parameters,
    save_adapter,
)
from tests.tuning.tiny import attached, build, tokens

FORMS = [
    {"projection_rank": 4},
    {"projection_rank": 4, "share_projections": True, "own_value": True},
    {"projection_rank": None, "share_projections": True},
    {"projection_rank": 4, "share_projections": True, "address": "token"},
    {"projection_rank": 4, "layers": (1,), "routes": 3},
]


def qwen3_of_1_7b():
    """Shapes of Qwen3-1.7B without its weights."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 0.005, 0.03),
        ({"own_value": True, "unmatched": "null", "token_route": True}, 0.005, 0.03),
        ({"share_projections": True}, 0.0001, 0.002),
        ({"projection_rank": None, "share_projections": True}, 0.005, 0.03),
        ({"projection_rank": None}, 0.25, 0.30),
    ],
)
def test_share_of_parameters_that_a_1_7b_model_gains(options, low, high):
    model = qwen3_of_1_7b()
    base = sum(p.numel() for p in model.parameters())
    assert base == 1_720_574_976
    attach(model, RosaConfig(**options))
    added = sum(p.numel() for p in rosa_parameters(model).values())
    assert low < added / base < high


@pytest.mark.parametrize("form", FORMS)
def test_forms_start_as_the_identity_learn_and_come_back(form, tmp_path):
    model, ids = build(), tokens(2, 40, kinds=4)
    options = {"window": 9, "sink_tokens": 3, **form}
    with torch.no_grad():
        attach(model, RosaConfig(adapters=False, window=9, sink_tokens=3))
        windowed = model(ids, use_cache=False).logits
    model = attach(build(), RosaConfig(**options)).train()
    assert torch.equal(model(ids).logits, windowed)
    freeze_base(model)
    optimizer = torch.optim.SGD(rosa_parameters(model).values(), lr=0.5)
    before, reached = model(ids, labels=ids).loss.item(), set()
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        reached |= {n for n, p in rosa_parameters(model).items() if bool((p.grad != 0).any())}
        optimizer.step()
    assert reached == set(rosa_parameters(model))
    assert loss.item() < before
    save_adapter(model.eval(), tmp_path)
    again = load_adapter(build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_stream(form):
    model, ids = attached(**form), tokens(2, 40)
    whole, out, cache = model(ids, use_cache=False).logits, [], None
    for piece in ids.split(7, dim=1):
        found = model(piece, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        out.append(found.logits)
    torch.testing.assert_close(torch.cat(out, 1), whole, atol=3e-5, rtol=1e-4)


def test_layers_share_one_set_of_projections():
    model = attached(projection_rank=4, share_projections=True)
    adapters = adapters_of(model)
    assert len({id(a.w_q) for a in (x.projections for x in adapters.values())}) == 1
    assert len({id(a.e0) for a in adapters.values()}) == len(adapters)
    names = set(rosa_parameters(model))
    assert {n for n in names if n.startswith("shared.")} == {
        f"shared.w_{w}.{part}" for w in "qkvo" for part in ("down", "up")
    }


def test_files_of_the_first_format_still_load(tmp_path):
    """Its names were those of the attention's projections, which LoRA wraps by name."""
    model = attached(own_value=True, projection_rank=None, token_route=True, inject="pre_attn")
    save_adapter(model, tmp_path)
    path = tmp_path / "rosa_config.json"
    description = json.loads(path.read_text())
    file = tmp_path / description["tensors"]["file"]
    old = {re.sub(r"projections\.w_(\w+)\.", r"\1_proj.", n): t for n, t in load_file(file).items()}
    assert {"layers.0.q_proj.weight", "layers.2.own_proj.weight"} <= old.keys()
    save_file(old, file)
    import hashlib

    data = file.read_bytes()
    description["tensors"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    description["format_version"] = 1
    del description["config"]["projection_rank"], description["config"]["share_projections"]
    path.write_text(json.dumps(description))
    ids = tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(load_adapter(build(), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_lora_after_attach_leaves_the_adapters_alone(targets):
    model = attached()
    inject_adapter_in_model(LoraConfig(target_modules=targets, init_lora_weights=False), model)
    wrapped = [n for n, _ in model.named_parameters() if ".lora_" in n]
    assert wrapped
    assert not [n for n in wrapped if "rosa" in n]
    assert set(rosa_parameters(model)) == set(rosa_parameters(attached()))
