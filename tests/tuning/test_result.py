"""Results on disk: every part is there, unchanged, and of this base model, or nothing loads."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.tuning import RosaConfig, attach, save_adapter
from rosakit.tuning.checkpoint import fingerprint
from rosakit.tuning.lora import add_lora, lora_parameters, save_lora
from rosakit.tuning.result import load_any, load_result, load_trained, save_trained
from rosakit.tuning.settings import TuneConfig
from tests.tuning.texts import model, tokenizer
from tests.tuning.tiny import tokens

ROUTE = RosaConfig(window=16, sink_tokens=2, adapters=False, token_route=True)


def trained(rank=2, noise=0.1):
    found = model()
    if rank:
        add_lora(found, rank)
    attach(found, ROUTE)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(found).values():
            parameter.add_(noise * torch.randn_like(parameter))
    return found


@pytest.fixture
def result(tmp_path):
    """A trained model, the folder of its result and that of its base."""
    base = tmp_path / "base"
    model().save_pretrained(base)
    tokenizer().save_pretrained(base)
    config = TuneConfig(model=str(base), rosa=ROUTE, lora_rank=2, device="cpu")
    folder = tmp_path / "run"
    found = trained()
    save_trained(found, folder, config)
    return found, folder, base


def lora_file(folder):
    (file,) = folder.glob("lora-*.safetensors")
    return file


def flip(folder):
    data = bytearray(lora_file(folder).read_bytes())
    data[-5] ^= 1
    lora_file(folder).write_bytes(bytes(data))


def remove_lora(folder):
    lora_file(folder).unlink()
    (folder / "lora.json").unlink()


BROKEN = {
    "no LoRA": (remove_lora, r"lacks lora\.json, but its run was with LoRA"),
    "no adapter": (lambda f: (f / "rosa_config.json").unlink(), r"lacks rosa_config\.json"),
    "no tensors": (lambda f: lora_file(f).unlink(), r"cannot read LoRA .*FileNotFound"),
    "flipped bit": (flip, r"is not what lora\.json describes"),
    "truncated": (lambda f: lora_file(f).write_bytes(b"x"), r"is not what lora\.json describes"),
    "empty json": (lambda f: (f / "lora.json").write_text("{}"), r"cannot read LoRA"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_lost_or_changed_part_is_named(result, kind):
    _, folder, _ = result
    spoil, said = BROKEN[kind]
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        load_result(folder)


def test_a_part_of_another_run_is_refused(result):
    _, folder, _ = result
    values = json.loads((folder / "tune.json").read_text())
    (folder / "tune.json").write_text(json.dumps({**values, "lora_rank": 0}))
    with pytest.raises(CheckpointError, match=r"holds lora\.json, but its run was without LoRA"):
        load_result(folder)


@torch.no_grad()
def test_other_weights_of_the_same_shape_are_refused(result):
    found, folder, _ = result
    ids = tokens(1, 40)
    assert torch.equal(load_result(folder)[0](ids).logits, found(ids).logits)
    # The same weights in another type are the same model.
    load_trained(model().to(torch.bfloat16), folder)
    other = model()
    other.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(CheckpointError, match="other weights than this LlamaModel"):
        load_trained(other, folder)
    assert not lora_parameters(other)
    load_trained(other, folder, any_base=True)
    assert lora_parameters(other)


def save_noisy(folder):
    noisy = trained(noise=0.5)
    parts = lora_parameters(noisy)
    save_lora(parts, folder, rank=2, alpha=None, base_model=fingerprint(noisy))


def test_a_full_disk_leaves_the_old_lora_whole(result, monkeypatch):
    found, folder, _ = result
    before = {n: p.detach().clone() for n, p in lora_parameters(found).items()}
    replace = os.replace

    def full(source, target):
        if os.fspath(target).endswith("lora.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            save_noisy(folder)
    again = lora_parameters(load_result(folder)[0])
    assert all(torch.equal(again[n], p) for n, p in before.items())
    save_noisy(folder)
    assert len(list(folder.glob("lora-*"))) == 1
    again = lora_parameters(load_result(folder)[0])
    assert not all(torch.equal(again[n], p) for n, p in before.items())


@torch.no_grad()
def test_a_saved_adapter_loads_onto_its_base(result, tmp_path):
    _, _, base = result
    route = trained(rank=0)
    save_adapter(route, tmp_path / "adapter")
    with pytest.raises(InvalidInputError, match=r"adapter alone.*--base"):
        load_any(str(tmp_path / "adapter"), device="cpu")
    loaded, _ = load_any(str(tmp_path / "adapter"), base=str(base), device="cpu")
    ids = tokens(1, 40)
    assert torch.equal(loaded(ids).logits, route(ids).logits)
    with pytest.raises(InvalidInputError, match="leave it out"):
        load_any(str(base), base=str(base), device="cpu")
