"""Checkpoints: round trips, and one clear error for everything that can be wrong."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.tuning import RosaConfig, attach, detach, load_adapter, rosa_parameters, save_adapter
from rosakit.tuning import checkpoint as module
from rosakit.tuning.attach import is_attached
from tests.tuning.tiny import attached, build, tokens

OPTIONS = {"token_route": True, "own_value": True, "layers": (0, 2), "unmatched": "null"}


@pytest.fixture
def saved(tmp_path):
    """A model and where its adapter is saved."""
    model = attached(**OPTIONS)
    return model, save_adapter(model, tmp_path / "adapter")


def tensors_file(path):
    (file,) = path.glob("adapter-*.safetensors")
    return file


@torch.no_grad()
def test_round_trip(saved):
    model, path = saved
    ids = tokens(2, 30)
    fresh = load_adapter(build(), path)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    other = attached(noise=0.3, **OPTIONS)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    load_adapter(other, path)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["rosa_config.json", tensors_file(path).name]
    )


def test_names_do_not_depend_on_the_architecture(saved):
    names = set(rosa_parameters(saved[0]))
    assert {"layers.0.projections.w_q.weight", "layers.2.e_null", "token_route.keep_bias"} <= names
    assert names == set(rosa_parameters(attached("gpt_neox", **OPTIONS)))


@torch.no_grad()
def test_window_and_estimator_may_differ_the_rest_may_not(saved):
    _, path = saved
    free = {"window": 4, "sink_tokens": 1, "estimator_options": {}}
    load_adapter(attach(build(), RosaConfig(**{**OPTIONS, **free})), path)
    with pytest.raises(CheckpointError, match=r"own_value=True there, False here"):
        load_adapter(attach(build(), RosaConfig(**{**OPTIONS, "own_value": False})), path)
    with pytest.raises(CheckpointError, match=r"retrieve=True there, False here"):
        load_adapter(attach(build(), RosaConfig(**{**OPTIONS, "retrieve": False})), path)


@pytest.mark.parametrize(
    "other,message",
    [
        (lambda: build("gpt_neox"), r"architecture 'LlamaModel' there, 'GPTNeoXModel' here"),
        (lambda: build(depth=4), r"num_hidden_layers 3 there, 4 here"),
        (lambda: build(hidden_size=64), r"hidden_size 32 there, 64 here"),
        (lambda: build(vocab_size=70), r"vocab_size 61 there, 70 here"),
    ],
)
def test_an_adapter_of_another_model(saved, other, message):
    model = other()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, saved[1])
    assert not is_attached(model)


@pytest.mark.parametrize("part", ["embed_tokens", "norm"])
@torch.no_grad()
def test_an_adapter_of_other_weights(saved, part):
    model = build()
    getattr(model.model, part).weight.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"other weights than this LlamaModel.*any_base"):
        load_adapter(model, saved[1])
    assert not is_attached(model)
    assert is_attached(load_adapter(model, saved[1], any_base=True))
    # Precision does not make another model.
    assert is_attached(load_adapter(build().to(torch.bfloat16), saved[1]))


def edit(path, **changes):
    file = path / "rosa_config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def cut(path, size):
    data = tensors_file(path).read_bytes()
    tensors_file(path).write_bytes(data[:size])


def flip(path):
    data = bytearray(tensors_file(path).read_bytes())
    data[-5] ^= 1
    tensors_file(path).write_bytes(bytes(data))


def rename_tensor(path):
    """A well-formed file whose tensors are not those of the model."""
    values = json.loads((path / "rosa_config.json").read_text())
    tensors = module._read_tensors(path, values)
    tensors["layers.9.e0"] = tensors.pop("layers.0.e0")
    tensors["layers.2.e1"] = tensors["layers.2.e1"][:-1]
    data = module.dump_tensors(tensors)
    tensors_file(path).write_bytes(data)
    digest = module.hashlib.sha256(data).hexdigest()
    edit(path, tensors={**values["tensors"], "bytes": len(data), "sha256": digest})


def not_safetensors(path):
    data = b"PK\x03\x04 something else"
    tensors_file(path).write_bytes(data)
    values = json.loads((path / "rosa_config.json").read_text())["tensors"]
    edit(
        path,
        tensors={**values, "bytes": len(data), "sha256": module.hashlib.sha256(data).hexdigest()},
    )


BROKEN = {
    "no tensors": (lambda p: tensors_file(p).unlink(), r"adapter-.*safetensors is missing"),
    "no json": (lambda p: (p / "rosa_config.json").unlink(), r"rosa_config.json is missing"),
    "truncated": (lambda p: cut(p, -100), r"truncated or half-written"),
    "empty": (lambda p: cut(p, 0), r"has 0 bytes.*truncated"),
    "flipped bit": (flip, r"corrupt: its SHA-256"),
    "half json": (
        lambda p: (p / "rosa_config.json").write_text('{"format": "rosa'),
        r"rosa_config.json is corrupt",
    ),
    "binary json": (
        lambda p: (p / "rosa_config.json").write_bytes(b"\xff\xfe\x00"),
        r"rosa_config.json is corrupt",
    ),
    "foreign json": (
        lambda p: (p / "rosa_config.json").write_text('{"peft_type": "LORA"}'),
        r"not a rosakit checkpoint",
    ),
    "a list": (
        lambda p: (p / "rosa_config.json").write_text("[]"),
        r"not a rosakit checkpoint",
    ),
    "newer": (lambda p: edit(p, format_version=3), r"format version 3, this rosakit reads 1"),
    "a part missing": (lambda p: edit(p, base_model=None), r"lacks a part"),
    "unknown option": (lambda p: edit(p, config={"windo": 3}), r"no field 'windo'; did you mean"),
    "bad option": (lambda p: edit(p, config={"bits": 99}), r"at most 16, got 99"),
    "other tensors": (
        rename_tensor,
        r"missing: layers.0.e0; unknown: layers.9.e0; shapes: layers.2.e1 \[31\] there, \[32\]",
    ),
    "no safetensors": (not_safetensors, r"no safetensors file"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("fresh", [True, False])
@torch.no_grad()
def test_what_is_broken_is_named_and_nothing_changes(saved, kind, fresh):
    _, path = saved
    spoil, message = BROKEN[kind]
    spoil(path)
    model = build() if fresh else attached(noise=0.3, **OPTIONS)
    ids = tokens(1, 20)
    before = model(ids).logits
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(model, path)
    assert str(path) in str(error.value)
    assert is_attached(model) is not fresh
    assert torch.equal(model(ids).logits, before)


def test_places_that_are_no_checkpoint(tmp_path):
    model = build()
    for path, message in (
        (tmp_path / "nowhere", "is not a directory"),
        (tmp_path, "never finished"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, path)


@pytest.mark.parametrize("fails_at", ["fsync of tensors", "write of json", "rename of json"])
@torch.no_grad()
def test_a_full_disk_leaves_the_old_checkpoint_whole(saved, monkeypatch, fails_at):
    model, path = saved
    ids = tokens(1, 20)
    wanted = model(ids).logits
    later = attached(noise=0.3, **OPTIONS)
    calls = {"fsync": 0, "replace": 0}
    real = {"fsync": os.fsync, "replace": os.replace}
    limits = {
        "fsync of tensors": ("fsync", 1),
        "write of json": ("fsync", 2),
        "rename of json": ("replace", 2),
    }

    def failing(name):
        def call(*args):
            calls[name] += 1
            if (name, calls[name]) == limits[fails_at]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[name](*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing("fsync"))
        patch.setattr(os, "replace", failing("replace"))
        with pytest.raises(CheckpointError, match=r"No space left on device.*is unchanged"):
            save_adapter(later, path)
    assert torch.equal(load_adapter(build(), path)(ids).logits, wanted)
    assert len(list(path.iterdir())) == 2
    save_adapter(later, path)
    assert torch.equal(load_adapter(build(), path)(ids).logits, later(ids).logits)
    assert len(list(path.glob("*.safetensors"))) == 1


def test_saving_where_a_file_is(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot save to"):
        save_adapter(attached(), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_a_detached_model_has_nothing_to_save(tmp_path):
    with pytest.raises(InvalidInputError, match="not attached"):
        save_adapter(build(), tmp_path)
    with pytest.raises(InvalidInputError, match="not attached"):
        save_adapter(detach(attached()), tmp_path)


@torch.no_grad()
def test_tensors_gathered_elsewhere(saved, tmp_path):
    model, path = saved
    full = {name: p.detach() * 2 for name, p in rosa_parameters(model).items()}
    save_adapter(model, tmp_path / "sharded", tensors=full)
    again = load_adapter(build(), tmp_path / "sharded")
    for name, parameter in rosa_parameters(again).items():
        assert torch.equal(parameter, full[name])
    full.pop("layers.0.e0")
    with pytest.raises(InvalidInputError, match=r"layers\.0\.e0"):
        save_adapter(model, path, tensors=full)
