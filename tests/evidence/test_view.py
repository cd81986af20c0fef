"""The experiments' attention: the window of the library, and recalled spans as defined."""

from __future__ import annotations

import pytest
import torch
from benchmarks.evidence import blocks
from benchmarks.evidence import view as module
from benchmarks.evidence.fast_norm import fuse_norms
from benchmarks.evidence.view import Seen, View, scattered, viewing

from rosakit.layers.token_match import best_successors
from rosakit.tuning import RosaConfig, attach, detach
from tests.tuning.tiny import build, tokens


def logits(model, ids, view=None):
    with torch.no_grad():
        if view is None:
            return model(input_ids=ids, use_cache=False).logits
        with viewing(model, view):
            return model(input_ids=ids).logits


@pytest.mark.parametrize("length", [5, 16, 40, 67])
def test_the_window_is_the_librarys(length):
    model, ids = build(depth=2), tokens(2, length)
    for window, sinks in ((8, 3), (8, 0), (64, 2)):
        here = logits(model, ids, View(window, sinks=sinks))
        attach(model, RosaConfig(window=window, sink_tokens=sinks, adapters=False))
        there = logits(model, ids)
        detach(model)
        assert torch.allclose(here, there, atol=1e-5)


def test_recalled_spans_are_the_librarys():
    model, ids = build(depth=2), tokens(2, 67, kinds=5)
    here = logits(model, ids, View(8, sinks=3, recall=3, before=2, after=4))
    config = RosaConfig(
        window=8, sink_tokens=3, adapters=False, recall=3, recall_before=2, recall_after=4
    )
    attach(model, config)
    assert torch.allclose(here, logits(model, ids), atol=1e-5)


def test_without_a_window_the_model_is_untouched():
    model, ids = build(depth=2), tokens(2, 40)
    before = model.config._attn_implementation
    plain = logits(model, ids)
    assert torch.allclose(logits(model, ids, View(None)), plain, atol=1e-5)
    assert model.config._attn_implementation == before
    # Spans that cover everything are full attention again.
    everything = View(4, recall=8, before=64, after=64)
    repeated = torch.cat([ids, ids], dim=1)
    seen = Seen(everything, repeated, torch.float32).bias(0, True)
    # Wherever every earlier token lies within 64 of a match, nothing is hidden.
    assert (seen[:, 0, 60] == 0).sum(-1).tolist() == [61, 61]


@pytest.mark.parametrize("chunk", [7, 1024])
def test_recalled_spans_are_the_surroundings_of_matches(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    ids = tokens(2, 50, kinds=5)
    view = View(6, sinks=2, recall=3, before=2, after=3, least=2)
    found = best_successors(ids, 3, min_length=2)
    seen = Seen(view, ids, torch.float32)
    for start in range(0, 50, chunk):
        bias = seen.bias(start, True)[:, 0]
        for b in range(2):
            for i in range(start, min(50, start + chunk)):
                keys = {j for j in range(i + 1) if i - j < 6 or j < 2}
                for p in found.position[b, i].tolist():
                    if p >= 0:
                        keys |= {j for j in range(p - 2, p + 3) if 0 <= j <= i}
                shown = {j for j in range(bias.shape[-1]) if bias[b, i - start, j] == 0}
                assert shown == keys


def test_layers_and_random_places():
    model, ids = build(depth=2), tokens(1, 60, kinds=5)
    window, recall = View(6), View(6, recall=4)
    plain, both = logits(model, ids, window), logits(model, ids, recall)
    one = logits(model, ids, View(6, recall=4, layers=(1,)))
    assert not torch.allclose(plain, both, atol=1e-4)
    assert not torch.allclose(one, both, atol=1e-4)
    assert torch.allclose(logits(model, ids, View(6, recall=4, layers=())), plain, atol=1e-5)
    found = best_successors(ids, 4)
    other = scattered(found)
    assert ((other.position >= 0) == (found.position >= 0)).all()
    assert (other.position <= torch.arange(60)[None, :, None]).all()

    # They mean nothing: the token before them is the current one no more often than by chance.
    def agree(match):
        valid = match.position > 0
        before = (match.position - 1).clamp(min=0).long()
        same = ids[0][before[0]] == ids[0][:, None]
        return float(same[valid[0]].float().mean())

    assert agree(found) == 1.0
    assert agree(other) < 0.5


def test_gradients_flow_through_every_form():
    for view in (View(4), View(4, recall=2), View(None)):
        model = build(depth=1)
        with viewing(model, view):
            model(input_ids=tokens(1, 24)).logits.sum().backward()
        weight = model.model.layers[0].self_attn.k_proj.weight
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0


VIEWS = (View(8, sinks=3), View(8, sinks=0), View(200, recall=2), View(8, recall=3, before=2))


def spread(ids, dtype, groups):
    """Queries, keys and values for a batch of token ids."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(ids), 1, ids.shape[1], 16)
    drawn = (torch.randn(*shape, generator=generator) for _ in range(4 + 2 * groups))
    parts = [x.to(ids.device, dtype) for x in drawn]
    q, k, v = parts[:4], parts[4 : 4 + groups], parts[4 + groups :]
    return [torch.cat(x, dim=1).requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("view", VIEWS, ids=["near", "no sinks", "wide", "far"])
@pytest.mark.parametrize("length", [5, 128, 300])
def test_blocks_are_the_mask(view, length, monkeypatch):
    monkeypatch.setattr(blocks, "STEP", blocks.SIZE)
    monkeypatch.setattr(blocks, "SHORT", blocks.SIZE)
    monkeypatch.setattr(module, "CHUNK", 64)
    ids = tokens(2, length, kinds=5)
    seen = Seen(view, ids, torch.float32)
    q, k, v = (x.detach() for x in spread(ids, torch.float32, 2))
    for recall in {False, seen.spans is not None}:
        there = seen.products(q, k, v, recall, None)
        here = blocks.attend(q, k, v, seen.tiled(recall), None)
        torch.testing.assert_close(here, there)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", [View(64), View(64, recall=4)], ids=["near", "far"])
def test_blocks_and_their_gradients_on_a_gpu(view, dtype):
    ids = tokens(2, 700, kinds=5).cuda()
    seen = Seen(view, ids, dtype)
    exact = Seen(view, ids, torch.float64)
    inputs = spread(ids, dtype, 2)
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    here = seen.attend(*inputs, layer=0, scale=None)
    there = exact.products(*doubled, view.recall > 0, None)
    slope = torch.randn_like(there)
    here.backward(slope.to(dtype))
    there.backward(slope)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3  # products in float32 may be rounded to TF32
    slopes = ((x.grad, y.grad) for x, y in zip(inputs, doubled, strict=True))
    for got, asked in ((here, there), *slopes):
        assert (got.double() - asked).norm() <= bound * asked.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_training_takes_the_mask_that_an_evaluation_made():
    ids = tokens(2, 300, kinds=5).cuda()
    seen = Seen(View(48), ids, torch.float32)
    inputs = spread(ids, torch.float32, 2)
    with torch.inference_mode():
        seen.attend(*inputs, layer=0, scale=None)
    Seen(View(48), ids, torch.float32).attend(*inputs, layer=0, scale=None).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_a_cached_mask_is_no_inference_tensor():
    module._near.cache_clear()
    with torch.inference_mode():
        seen = Seen(View(48), tokens(2, 300, kinds=5), torch.float32)
        assert not seen.tiled(False).kv_indices.is_inference()
        hidden = seen.tiled(False).mask_mod.__closure__
    tensors = [cell.cell_contents for cell in hidden if torch.is_tensor(cell.cell_contents)]
    assert tensors
    assert not any(x.is_inference() for x in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_norms_are_the_norms(dtype):
    model, ids = build(depth=2).to(dtype), tokens(2, 30)
    norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.5)

    def run():
        model.zero_grad()
        out = model(input_ids=ids, use_cache=False).logits
        out.float().square().mean().backward()
        return [out.detach().float(), *(m.weight.grad.float() for m in norms)]

    before = run()
    assert fuse_norms(model) == len(norms) == 5
    assert all("forward" in vars(m) for m in norms)
    for got, asked in zip(run(), before, strict=True):
        # The sum over channels runs in another order; in bfloat16 the product is rounded once less.
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert (got - asked).norm() <= bound * asked.norm()
