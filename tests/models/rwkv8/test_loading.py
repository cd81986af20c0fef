"""Checkpoints: every format and family comes back, every fault is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.models import rwkv8
from tests.models.rwkv8.small import MODELS, random_model, tokens_for


def store(model, path):
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: x.numpy() for name, x in tensors.items()})
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_every_family_in_every_format(name, suffix, tmp_path):
    model = random_model(name)
    path = store(model, tmp_path / f"model_{model.bits}bit{suffix}")
    loaded = rwkv8.load(path)
    assert loaded.config == model.config
    assert not loaded.training
    tokens = tokens_for(model, 2, 20)
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=0)
    assert next(iter(loaded.parameters())).requires_grad


def test_saved_models_say_their_bits(tmp_path):
    model = random_model("lm4")
    rwkv8.save(model, tmp_path / "model.safetensors")
    assert rwkv8.load(tmp_path).config == model.config  # a folder names its model.safetensors
    with pytest.raises(CheckpointError, match="says that it has 4 bits"):
        rwkv8.load(tmp_path, bits=1)


def test_bits_are_asked_for_where_nothing_tells(tmp_path):
    path = store(random_model("lm4"), tmp_path / "lm.pth")
    with pytest.raises(CheckpointError, match="pass bits=1 or bits=4"):
        rwkv8.load(path)
    assert rwkv8.load(path, bits=4).bits == 4
    assert rwkv8.load(path, bits=1).bits == 1
    with pytest.raises(InvalidInputError, match="1 or 4"):
        rwkv8.load(path, bits=2)


def test_the_published_norms_of_later_blocks_are_idle(tmp_path):
    tensors = random_model("lm1").state_dict()
    tensors["blocks.1.ln0.weight"] = torch.ones(8)
    tensors["blocks.1.ln0.bias"] = torch.ones(8)
    torch.save(tensors, tmp_path / "rosa1bit.pth")
    rwkv8.load(tmp_path / "rosa1bit.pth")


def test_compiled_models_were_saved_with_a_prefix(tmp_path):
    tensors = random_model("alone").state_dict()
    torch.save({f"_orig_mod.{n}": x for n, x in tensors.items()}, tmp_path / "m.pth")
    assert rwkv8.load(tmp_path / "m.pth").config.alone


def test_half_precision(tmp_path):
    model = random_model("hybrid").to(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert rwkv8.load(tmp_path / "m.pth").o.weight.dtype == torch.float32
    loaded = rwkv8.load(tmp_path / "m.pth", dtype=torch.bfloat16)
    assert loaded(torch.zeros(1, 40, dtype=torch.int64)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.pop("lin.bias"), r"looks like a counting model .* but lacks lin\.bias"),
        (lambda t: t.update({"att.weight": torch.ones(2)}), r"also holds att\.weight"),
        (lambda t: t.update({"lin.bias": torch.ones(3)}), r"lin\.bias has shape \[3\] where"),
        (lambda t: t.update({"lin.bias": torch.full((8,), float("nan"))}), "NaN or infinity"),
        (lambda t: t.update({"lin.bias": torch.ones(8, dtype=torch.int64)}), "expected floats"),
        (lambda t: t.pop("e.weight"), r"lacks tensor e\.weight"),
        (lambda t: t.update({"e.weight": torch.ones(8)}), r"shape \[8\], expected 2 dimensions"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_spoiled_tensors(spoil, message, tmp_path):
    tensors = dict(random_model("counting1").state_dict())
    spoil(tensors)
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        rwkv8.load(tmp_path / "m.pth")


def test_unknown_tensors_can_be_ignored_but_missing_ones_never(tmp_path):
    tensors = random_model("counting1").state_dict() | {"att.weight": torch.ones(2)}
    torch.save(tensors, tmp_path / "m.pth")
    rwkv8.load(tmp_path / "m.pth", strict=False)
    del tensors["o.bias"]
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"lacks o\.bias"):
        rwkv8.load(tmp_path / "m.pth", strict=False)


def test_foreign_models_are_named(tmp_path):
    torch.save({"transformer.h.0.attn.weight": torch.ones(2)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"no RWKV-8 ROSA model.*it holds transformer\.h"):
        rwkv8.load(tmp_path / "m.pth")


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_damaged_files(suffix, tmp_path):
    path = store(random_model("alone"), tmp_path / f"m{suffix}")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged, incomplete or of another format"):
            rwkv8.load(path)


def test_pickles_do_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"e.weight": Payload()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError):
        rwkv8.load(tmp_path / "m.pth")
    np.savez(tmp_path / "m.npz", x=np.array([Payload()], dtype=object))
    with pytest.raises(CheckpointError):
        rwkv8.load(tmp_path / "m.npz")
    assert not (tmp_path / "ran").exists()


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        rwkv8.load(tmp_path / "missing.pth")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected \.pth, \.npz or \.safetensors"):
        rwkv8.load(tmp_path / "notes.txt")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        rwkv8.load(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"saved as \.safetensors"):
        rwkv8.save(random_model("alone"), tmp_path / "m.pth")
