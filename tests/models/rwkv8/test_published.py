"""Every published checkpoint by its exact names and shapes: loads, runs, steps, and refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rosakit.errors import CheckpointError
from rosakit.models import rwkv8
from rosakit.models.rwkv8.loading import family_of
from tests.models.rwkv8.published import FILES, FULL_SIZE, random_tensors
from tests.models.rwkv8.small import tokens_for


def store(tensors, path):
    if path.suffix == ".pth":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: x.numpy() for name, x in tensors.items()})
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_loads_in_every_format_and_comes_back(name, tmp_path):
    """The variant, its sizes and its bits come from names, shapes and the file's published name."""
    shapes, family, layers, bits = FILES[name]
    tensors = random_tensors(name)
    outputs = []
    for suffix in (".pth", ".npz", ".safetensors"):
        model = rwkv8.load(store(tensors, tmp_path / f"{name}{suffix}"))
        assert (family_of(model), model.config.layers, model.bits) == (family, layers, bits)
        assert model.vocabulary == shapes.get("e.weight", shapes.get("emb.weight"))[0]
        for tensor, value in model.state_dict().items():
            assert torch.equal(value, tensors[tensor]), tensor
        left = set(tensors) - set(model.state_dict())
        assert all(".ln0." in tensor for tensor in left)  # idle norms of later blocks
        outputs.append(model(tokens_for(model, 2, 40)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    rwkv8.save(model, tmp_path / "again" / "model.safetensors")
    again = rwkv8.load(tmp_path / "again")
    assert again.config == model.config
    assert torch.equal(again(tokens_for(model, 2, 40)), outputs[0])


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_steps_equal_the_whole_sequence(name, tmp_path):
    """One token at a time, in chunks, and at once; float64, so that no bit sits on rounding."""
    path = store(random_tensors(name, seed=1), tmp_path / f"{name}.pth")
    model = rwkv8.load(path, dtype=torch.float64)
    tokens = tokens_for(model, 2, 45)
    whole = model(tokens)
    for cuts in ([17, 18, 40, 45], list(range(1, 46))):
        state = model.init_state(2)
        begins = [0, *cuts[:-1]]
        parts = [model.step(tokens[:, a:b], state) for a, b in zip(begins, cuts, strict=True)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["251018_rosa_4bit_run", "251105_reverse_L2", next(n for n in FILES if "4bit-mini" in n)],
)
def test_every_tensor_counts(name, tmp_path):
    """Without any one of them, with another shape, or with one more: an error that names it."""
    tensors = random_tensors(name)
    path = tmp_path / f"{name}.pth"
    used = [n for n in tensors if ".ln0." not in n or n.startswith("blocks.0.")]
    kinds = {"".join(c for c in n if not c.isdigit()): n for n in used}  # one layer of each kind
    for tensor in kinds.values():
        torch.save({n: x for n, x in tensors.items() if n != tensor}, path)
        with pytest.raises(CheckpointError):
            rwkv8.load(path)
        narrow = tensors[tensor].flatten()[1:]
        torch.save(tensors | {tensor: narrow}, path)
        with pytest.raises(CheckpointError):
            rwkv8.load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_newer_variant_is_refused(name, tmp_path):
    torch.save(random_tensors(name) | {"rosa99.emb": torch.ones(1)}, tmp_path / f"{name}.pth")
    with pytest.raises(CheckpointError, match=r"also holds rosa99\.emb"):
        rwkv8.load(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("name", FULL_SIZE)
@torch.no_grad()
def test_language_models_at_full_size(name, tmp_path):
    """65536 tokens, 768 channels, 12 layers, half precision as published.

    Every tensor is one number spread over its shape, which keeps file and memory small.
    """
    tensors = {n: torch.full((), 0.01).half().expand(shape) for n, shape in FULL_SIZE[name].items()}
    path = tmp_path / f"{name}.pth"
    torch.save(tensors, path)
    assert path.stat().st_size < 1 << 20
    model = rwkv8.load(path, dtype=torch.float16)
    assert (model.vocabulary, model.config.channels, model.config.layers) == (65536, 768, 12)
    assert model.bits == (4 if "4bit" in name else 1)
    idle = [n for n in tensors if ".ln0." in n and not n.startswith("blocks.0.")]
    expected = sum(x.numel() for n, x in tensors.items() if n not in idle)
    assert sum(p.numel() for p in model.parameters()) == expected
    logits = model(torch.tensor([[510, 65535, 510]]))
    assert logits.shape == (1, 3, 65536)
    assert bool(logits.isfinite().all())
