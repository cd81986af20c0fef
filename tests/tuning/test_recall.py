"""Recalled spans: the definition, and the same numbers whole, chunked, decoded, padded, packed."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers.token_match import best_successors
from rosakit.tuning import RosaConfig, attach, detach
from rosakit.tuning.recall import span_places
from rosakit.tuning.session import load_session, save_session
from rosakit.types import Match
from tests.tuning.tiny import FAMILIES, build, pad_rows, positions_of, tokens

OPTIONS = {"window": 7, "sink_tokens": 2, "adapters": False, "recall": 3, "recall_before": 2,
           "recall_after": 3}  # fmt: skip


def recalling(family="llama", **options):
    return attach(build(family), RosaConfig(**{**OPTIONS, **options}))


def run(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_a_query_sees_window_sinks_and_the_surroundings_of_its_matches():
    ids = tokens(2, 40, kinds=5)
    model = recalling()
    found = best_successors(ids, 3)
    seen = {}

    def keep(module, args, kwargs):
        recall = kwargs["rosa_context"].recall
        where = recall.plan.keys(40, False)
        seen["mask"] = recall.mask(0, 40, 7, 2, where)[:, 0]

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    run(model, ids, use_cache=False)
    handle.remove()
    for b in range(2):
        for i in range(40):
            keys = {j for j in range(i + 1) if i - j < 7 or j < 2}
            for p in found.position[b, i].tolist():
                if p >= 0:
                    keys |= {j for j in range(p - 2, p + 3) if 0 <= j <= i}
            assert set(seen["mask"][b, i].nonzero()[:, 0].tolist()) == keys


def test_spans_that_cover_everything_are_full_attention_and_none_are_the_window():
    ids = tokens(2, 50, kinds=3)
    full = run(build(), ids)
    wide = recalling(recall=8, recall_before=64, recall_after=64)
    found = best_successors(ids, 1).position[0, :, 0] >= 0
    last = int((~found).nonzero().max()) if bool((~found).any()) else -1
    assert last < 40  # from there on every position has a match, so it sees everything
    assert not torch.allclose(run(recalling(recall=0), ids), full, atol=1e-3)
    # One layer: what a position sees then does not depend on what earlier ones saw.
    one, other = build(depth=1), build(depth=1)
    attach(one, wide.rosa.config)
    assert torch.allclose(run(one, ids)[0, last + 1 :], run(other, ids)[0, last + 1 :], atol=1e-5)
    window = attach(build(), RosaConfig(window=7, sink_tokens=2, adapters=False))
    assert torch.equal(run(recalling(retrieve=False), ids), run(window, ids))
    distinct = torch.arange(3, 43)[None]  # nothing repeats, so nothing is recalled
    assert torch.allclose(run(recalling(), distinct), run(window, distinct), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [[1] * 41, [20, 21], [13, 1, 1, 9, 1, 16]])
def test_a_cache_gives_the_numbers_of_the_whole_sequence(family, split):
    model, ids = recalling(family), tokens(2, 41, kinds=6)
    whole = run(model, ids, use_cache=False)
    cache, parts, begin = None, [], 0
    for size in split:
        with torch.no_grad():
            out = model(
                input_ids=ids[:, begin : begin + size], past_key_values=cache, use_cache=True
            )
        cache, begin = out.past_key_values, begin + size
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)


def test_a_single_query_attends_to_a_bounded_number_of_keys():
    model, ids = recalling(), tokens(1, 200, kinds=6)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :150], use_cache=True).past_key_values
    sizes = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def count(q, k, *args, **kwargs):
        sizes.append(k.shape[2])
        return inner(q, k, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        for t in range(150, 200):
            model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    assert len(sizes) == 3 * 50
    assert max(sizes) <= 7 + 2 + 3 * 5


def test_a_step_copies_no_past_and_copies_of_a_cache_go_their_own_ways():
    model, ids = recalling(), tokens(1, 160, kinds=6)
    whole = run(model, ids, use_cache=False)

    def step(cache, t):
        with torch.no_grad():
            out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        return out.logits[:, 0]

    with torch.no_grad():
        cache = model(input_ids=ids[:, :100], use_cache=True).past_key_values
    step(cache, 100)
    layer = cache.layers[0]
    place = layer.keys.data_ptr()
    for t in range(101, 110):
        assert torch.allclose(step(cache, t), whole[:, t], atol=2e-5)
        assert layer.keys.data_ptr() == place
    twin = copy.deepcopy(cache)
    assert torch.allclose(step(twin, 110), whole[:, 110], atol=2e-5)
    with torch.no_grad():  # the original takes another token: the copy does not notice
        model(input_ids=ids[:, 3:4], past_key_values=cache, use_cache=True)
    assert torch.allclose(step(twin, 111), whole[:, 111], atol=2e-5)
    cache.crop(-1)
    for t in range(110, 160):
        assert torch.allclose(step(cache, t), whole[:, t], atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(side):
    model = recalling(token_route=True)
    rows = [tokens(1, n, kinds=5, seed=n)[0] for n in (37, 24, 30)]
    ids, mask = pad_rows(rows, side)
    out = run(model, ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    for b, row in enumerate(rows):
        alone = run(model, row[None], use_cache=False)[0]
        assert torch.allclose(out[b][mask[b] == 1], alone, atol=2e-5)
    if side == "left":
        chunk = {"use_cache": True}
        with torch.no_grad():
            first = model(input_ids=ids[:, :20], attention_mask=mask[:, :20],
                          position_ids=positions_of(mask)[:, :20], **chunk)  # fmt: skip
            cache, parts = first.past_key_values, [first.logits]
            for t in range(20, 37):
                out_t = model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1],
                              position_ids=positions_of(mask)[:, t : t + 1],
                              past_key_values=cache, **chunk)  # fmt: skip
                parts.append(out_t.logits)
        streamed = torch.cat(parts, 1)
        for b, row in enumerate(rows):
            alone = run(model, row[None], use_cache=False)[0]
            assert torch.allclose(streamed[b][mask[b] == 1], alone, atol=2e-5)


def test_packed_documents_recall_nothing_of_each_other():
    model = recalling()
    rows = [tokens(1, n, kinds=4, seed=n)[0] for n in (25, 33)]
    ids = torch.cat(rows)[None]
    position = torch.cat([torch.arange(len(r)) for r in rows])[None]
    packed = run(model, ids, position_ids=position, use_cache=False)[0]
    alone = torch.cat([run(model, r[None], use_cache=False)[0] for r in rows])
    assert torch.allclose(packed, alone, atol=2e-5)


def test_generation_beams_rollback_and_sessions(tmp_path):
    model, prompt = recalling(token_route=True), tokens(2, 30, kinds=5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    beams = model.generate(prompt, num_beams=3, **options)
    assert torch.equal(beams, model.generate(prompt, num_beams=3, use_cache=False, **options))
    offloaded = recalling(token_route=True, recall_offload=True)
    offloaded.rosa.token_route.load_state_dict(model.rosa.token_route.state_dict())
    assert torch.equal(offloaded.generate(prompt, **options), cached)
    with torch.no_grad():
        cache = model(input_ids=cached[:, :36], use_cache=True).past_key_values
        cache.crop(-4)
        again = model(input_ids=cached[:, 32:40], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(again, run(model, cached[:, :40], use_cache=False)[:, 32:], atol=2e-5)
    with torch.no_grad():
        cache = model(input_ids=cached[:, :33], use_cache=True).past_key_values
        save_session(tmp_path / "s", model, cache)
        held = load_session(tmp_path / "s", model).cache
        here = model(input_ids=cached[:, 33:34], past_key_values=cache, use_cache=True).logits
        there = model(input_ids=cached[:, 33:34], past_key_values=held, use_cache=True).logits
    assert torch.equal(here, there)


def test_training_reads_through_the_spans_and_a_copy_is_independent():
    model = recalling()
    ids = tokens(1, 40, kinds=5)
    model.train()
    model.get_input_embeddings().weight.grad = None
    model(input_ids=ids, use_cache=False).logits[0, -1].sum().backward()
    far = model.get_input_embeddings().weight.grad
    assert torch.isfinite(far).all()
    twin = copy.deepcopy(model).eval()
    before = run(twin, ids)
    detach(model)
    assert torch.equal(run(twin, ids), before)


def test_places_stay_inside_the_document():
    match = Match(torch.tensor([[[-1, 1, 5]]]), torch.tensor([[[0, 1, 1]]]))
    own, first = torch.tensor([[0, 4, 6]]), torch.tensor([[0, 0, 4]])
    places = span_places(match, 1, 2, 2, own, first)
    assert places[0].tolist() == [[-1, -1, -1, -1], [-1, 0, 1, 2], [-1, 4, 5, 6]]


@pytest.mark.parametrize("length", [1, 5, 7])
def test_what_fits_into_the_window_is_the_models_own(length):
    ids = tokens(2, length, kinds=3)
    assert torch.allclose(run(recalling(), ids), run(build(), ids), atol=1e-6)


def test_recall_needs_a_window():
    with pytest.raises(InvalidInputError, match="adds to a window and there is none"):
        RosaConfig(window=None, recall=2)
