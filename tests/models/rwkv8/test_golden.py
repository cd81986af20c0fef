"""Published layers, blocks and checkpoints: same numbers, same answers, same accuracies."""

from __future__ import annotations

import pytest
import torch

from rosakit.models import rwkv8
from rosakit.models.rwkv8.rosa_layers import RosaOptions
from rosakit.ops import estimators
from tests.conftest import GOLDEN


def cases(data):
    for n in range(int(data["n"])):
        prefix = f"c{n:02d}_"
        yield {
            name.removeprefix(prefix): torch.from_numpy(value)
            for name, value in data.items()
            if name.startswith(prefix)
        }


def checkpoint(golden, name):
    golden(f"weights_{name}")  # skips where it is missing
    return rwkv8.load(GOLDEN / f"weights_{name}.npz")


@pytest.mark.parametrize("name, bits", [("layer_1bit", 1), ("layer_4bit", 4)])
@torch.no_grad()
def test_stream_layers_are_exact(golden, name, bits):
    for n, case in enumerate(cases(golden(name))):
        layer = rwkv8.RosaStreamLayer(case["x"].shape[-1], bits)
        layer.load_state_dict({"emb0": case["emb0"], "emb1": case["emb1"]})
        assert torch.equal(layer(case["x"]), case["out"]), f"case {n}"
        state = rwkv8.State(case["x"].shape[0])
        steps = [layer(x[:, None], state, "rosa") for x in case["x"].unbind(1)]
        assert torch.equal(torch.cat(steps, 1), case["out"]), f"case {n}, step by step"


@pytest.mark.skipif("bitflip" not in estimators.names(), reason="no bitflip estimator")
def test_gradients_of_the_one_bit_layer(golden):
    """The published backward flips every bit of the one stream and divides by its magnitude."""
    data = golden("layer_1bit")
    for n, case in enumerate(cases(data)):
        x = case["x"].clone().requires_grad_()
        layer = rwkv8.RosaStreamLayer(x.shape[-1], 1)
        layer.load_state_dict({"emb0": case["emb0"], "emb1": case["emb1"]})
        layer.rosa_options = RosaOptions(
            "bitflip", {"slope": "inverse", "floor": float(data["tau"])}
        )
        layer(x).backward(case["gy"])
        for got, name in ((x.grad, "gx"), (layer.emb0.grad, "gemb0"), (layer.emb1.grad, "gemb1")):
            torch.testing.assert_close(
                got,
                case[name],
                rtol=1e-4,
                atol=1e-4,
                msg=lambda m, n=n, name=name: f"{n} {name} {m}",
            )


@pytest.mark.parametrize("name, bits", [("layer_qkv1", 1), ("layer_qkv4", 4)])
@torch.no_grad()
def test_qkv_layers_are_exact(golden, name, bits):
    for n, case in enumerate(cases(golden(name))):
        q, k, v = case["q"], case["k"], case["v"]
        layer = rwkv8.RosaQkvLayer(q.shape[-1], bits)
        layer.load_state_dict({"emb": case["emb"]})
        assert torch.equal(layer(q, k, v), case["out"]), f"case {n}"
        state = rwkv8.State(q.shape[0])
        cut = q.shape[1] // 3
        parts = [
            layer(q[:, a:b], k[:, a:b], v[:, a:b], state, "rosa")
            for a, b in ((0, cut), (cut, q.shape[1]))
            if b > a
        ]
        assert torch.equal(torch.cat(parts, 1), case["out"]), f"case {n}, in two chunks"


@pytest.mark.parametrize("name, bits", [("block_qkv1", 1), ("block_qkv4", 4)])
@torch.no_grad()
def test_blocks(golden, name, bits):
    for n, case in enumerate(cases(golden(name))):
        block = rwkv8.RosaBlock(case["x"].shape[-1], bits)
        block.load_state_dict({k.removeprefix("w."): v for k, v in case.items() if k[:2] == "w."})
        torch.testing.assert_close(
            block(case["x"]), case["out"], rtol=0, atol=1e-5, msg=f"case {n}"
        )


@pytest.mark.parametrize(
    "weights, run, layers, bits",
    [
        ("251016_rosa_1bit_run", "e2e_251016_1bitx2", 2, 1),
        ("251018_rosa_4bit_run", "e2e_251018_4bitx4", 4, 4),
    ],
)
@torch.no_grad()
def test_counting_checkpoints(golden, weights, run, layers, bits):
    model, data = checkpoint(golden, weights), golden(run)
    assert (model.config.layers, model.bits) == (layers, bits)
    tokens = torch.from_numpy(data["tokens"]).long()
    logits = model(tokens[:, :-1])
    torch.testing.assert_close(logits, torch.from_numpy(data["logits"]), rtol=0, atol=1e-4)
    correct = (logits.argmax(-1) == tokens[:, 1:]).sum(1)
    assert correct.tolist() == data["correct"].tolist()

    tokens = torch.from_numpy(data["rand_tokens"]).long()
    logits = model(tokens[:, :-1])
    assert torch.equal(logits.argmax(-1), torch.from_numpy(data["rand_argmax"]).long())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(data["rand_loss"]), abs=1e-5)


@torch.no_grad()
def test_counting_layers_see_what_the_published_ones_saw(golden):
    model, data = checkpoint(golden, "251018_rosa_4bit_run"), golden("e2e_251018_4bitx4")
    for n in range(1, 5):
        out = model.get_submodule(f"rosa{n}")(torch.from_numpy(data[f"in_rosa{n}"]))
        assert torch.equal(out, torch.from_numpy(data[f"out_rosa{n}"])), f"layer {n}"


@torch.no_grad()
def test_reverse_checkpoint(golden):
    """All 600 rows: same answers as published, so the same accuracy; logits to rounding."""
    model, data = checkpoint(golden, "251105_reverse_L2"), golden("e2e_251105_rev")
    tokens = torch.from_numpy(data["tokens"]).long()
    model.use_wkv7("reference")
    rows = torch.from_numpy(data["logit_rows"]).long()
    logits = model(tokens[rows, :-1])
    torch.testing.assert_close(logits, torch.from_numpy(data["logits"]), rtol=0, atol=4e-4)
    model.use_wkv7("chunked")
    answers = model(tokens[:, :-1]).argmax(-1)
    assert torch.equal(answers, torch.from_numpy(data["argmax"]).long())


@torch.no_grad()
def test_reverse_checkpoint_inside(golden):
    """Projections, ROSA outputs and every sub-layer's output, at both layers."""
    model, data = checkpoint(golden, "251105_reverse_L2"), golden("e2e_251105_rev")
    model.use_wkv7("reference")
    seen = {}
    for n in (1, 2):
        rosa = model.get_submodule(f"rosa{n}")
        parts = {
            "q": rosa.q,
            "k": rosa.k,
            "v": rosa.v,
            "y": rosa.rosa_qkv,
            "rosa_out": rosa,
            "rwkv_out": model.get_submodule(f"rwkv{n}"),
            "ffn_out": model.get_submodule(f"ffn{n}"),
        }
        for name, part in parts.items():
            part.register_forward_hook(
                lambda _, __, out, name=f"{name}{n}": seen.__setitem__(
                    name, out[0] if isinstance(out, tuple) else out
                )
            )
    model(torch.from_numpy(data["tokens"]).long()[data["inter_rows"], :-1])
    for name, value in seen.items():
        torch.testing.assert_close(
            value, torch.from_numpy(data[f"inter_{name}"]), rtol=0, atol=4e-4, msg=name
        )
    assert torch.equal(seen["y1"], torch.from_numpy(data["inter_y1"]))
    assert len(seen) == 14


@pytest.mark.parametrize("weights", ["251018_rosa_4bit_run", "251105_reverse_L2"])
@torch.no_grad()
def test_checkpoints_step_by_step(golden, weights):
    """Recurrent mode: a prefill of 50 tokens, then one by one, agrees with the whole sequence."""
    model = checkpoint(golden, weights)
    data = golden("e2e_251018_4bitx4" if "4bit" in weights else "e2e_251105_rev")
    tokens = torch.from_numpy(data["tokens"][-4:]).long()[:, :-1]
    whole = model(tokens)
    state = model.init_state(4)
    parts = [model.step(tokens[:, :50], state)]
    parts += [model.step(token, state)[:, None] for token in tokens[:, 50:].unbind(1)]
    steps = torch.cat(parts, 1)
    assert state.length == tokens.shape[1]
    assert torch.equal(steps.argmax(-1), whole.argmax(-1))
