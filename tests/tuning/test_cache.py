"""Caches: bounded, exact, and through everything that generation does to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rosakit.errors import InvalidInputError
from rosakit.tuning import retention
from rosakit.tuning.cache import SinkWindowLayer
from rosakit.tuning.retention import WindowIndex
from rosakit.tuning.window import visible
from tests.tuning.tiny import FAMILIES, attached, build, pad_rows, positions_of, tokens

RESERVE = 5


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    """A reserve that short sequences fill and overflow."""
    monkeypatch.setattr(retention, "RESERVE", RESERVE)


WHOLE = {"token_route": True, "own_value": True, "global_layers": (1,)}


def in_chunks(model, ids, sizes, mask=None, cache=None):
    """Logits of a sequence fed in chunks, and the cache."""
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        options = {}
        if mask is not None:
            options["attention_mask"] = mask[:, :stop]
            options["position_ids"] = positions_of(mask)[:, start:stop]
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inject", ["post_attn", "pre_attn"])
@pytest.mark.parametrize("address", ["learned", "token"])
def test_whole_chunked_and_single_steps_agree(family, inject, address):
    model = attached(family, inject=inject, address=address, **WHOLE)
    ids = tokens(2, 40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for sizes in ([40], [1] * 40, [7, 1, 1, 20, 1, 10], [2, 38]):
            got, _ = in_chunks(model, ids, sizes)
            torch.testing.assert_close(got, whole, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "run"},
        {"granularity": "run", "successor": "strict"},
        {"max_length": 3, "min_length": 2},
        {"unmatched": "self"},
        {"unmatched": "null"},
        {"retrieve": False},
        {"token_min_length": 2, "token_candidates": 2},
        {"window": None},
        {"window": None, "adapters": False},
        {"adapters": False, "token_route": False},
        {"window": 1, "sink_tokens": 0, "global_layers": ()},
        {"window": 30, "sink_tokens": 0},
    ],
    ids=str,
)
def test_every_option_streams_exactly(options):
    options = {**WHOLE, **options}
    if options.get("window", 9) is None:
        options.pop("global_layers")
    model = attached(**options)
    ids = tokens(2, 40, kinds=3)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        got, _ = in_chunks(model, ids, [11, 1, 1, 5] + [1] * 22)
    torch.testing.assert_close(got, whole, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("address", ["learned", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_stream_like_rows_alone(address, side):
    model = attached(address=address, **WHOLE)
    rows = [tokens(1, n, seed=n)[0] for n in (31, 2, 14)]
    ids, mask = pad_rows(rows, side)
    with torch.no_grad():
        whole = model(
            ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        ).logits
        for sizes in ([31], [12, 1, 1, 17]):
            got, _ = in_chunks(model, ids, sizes, mask)
            for i, row in enumerate(rows):
                alone = model(row[None], use_cache=False).logits[0]
                real = mask[i] != 0
                torch.testing.assert_close(whole[i][real], alone, atol=3e-5, rtol=1e-4)
                torch.testing.assert_close(got[i][real], alone, atol=3e-5, rtol=1e-4)


def test_padding_between_turns_leaves_no_trace():
    """A right-padded first turn, a second turn after it: rows have holes."""
    model = attached(**WHOLE)
    first = [tokens(1, n, seed=n)[0] for n in (15, 4)]
    second = tokens(2, 9, seed=5)
    ids, mask = pad_rows(first, "right")
    ids = torch.cat([ids, second], 1)
    mask = torch.cat([mask, torch.ones_like(second)], 1)
    with torch.no_grad():
        for sizes in ([15, 9], [15, 4, 1, 1, 3]):
            got, cache = in_chunks(model, ids, sizes, mask)
            for i in range(2):
                alone = model(torch.cat([first[i], second[i]])[None], use_cache=False).logits[0]
                torch.testing.assert_close(got[i][mask[i] != 0], alone, atol=3e-5, rtol=1e-4)
    assert cache.layers[0].keys.shape[2] <= 9 + 3 + RESERVE


@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_holds_sinks_and_window_only(padded):
    model = attached(window=9, sink_tokens=3, global_layers=(1,))
    ids, mask = tokens(2, 60), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
    with torch.no_grad():
        _, cache = in_chunks(model, ids, [25] + [1] * 35, mask)
    held = [layer.keys.shape[2] for layer in cache.layers[:3]]
    assert held == [12 + RESERVE, 60, 12 + RESERVE]
    assert cache.get_seq_length() == 60


def test_reset_makes_a_cache_fresh():
    model = attached(**WHOLE)
    ids = tokens(1, 30)
    with torch.no_grad():
        wanted, cache = in_chunks(model, ids, [20, 10])
        cache.reset()
        assert cache.get_seq_length() == 0
        got, _ = in_chunks(model, ids, [20, 10], cache=cache)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_batch_operations_carry_every_state(padded):
    model = attached(**WHOLE)
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7], mask[2, :25] = 0, 0
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        _, cache = in_chunks(model, ids[:, :30], [30], mask[:, :30])
        moved = copy.deepcopy(cache)
        moved.reorder_cache(rows[:3])
        picked = copy.deepcopy(cache)
        picked.batch_select_indices(torch.tensor([1]))
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        for held, chosen in (
            (cache, torch.arange(3)),
            (moved, rows[:3]),
            (picked, torch.tensor([1])),
            (repeated, torch.tensor([0, 0, 1, 1, 2, 2])),
        ):
            wanted, _ = in_chunks(model, ids[chosen], [30, 10], mask[chosen])
            got = model(
                ids[chosen, 30:],
                attention_mask=mask[chosen],
                position_ids=positions_of(mask[chosen])[:, 30:],
                past_key_values=held,
            ).logits
            torch.testing.assert_close(got, wanted[:, 30:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_crop_with_recorded_past_goes_back_exactly(padded):
    model = attached(**WHOLE)
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :13] = 0
    with torch.no_grad():
        wanted, _ = in_chunks(model, ids, [50], mask)
        _, cache = in_chunks(model, ids[:, :30], [30], mask[:, :30])
        cache.activate_past_recording()
        extra = RESERVE + 6
        junk = torch.cat([ids[:, :30], tokens(2, extra, seed=9)], 1)
        grown = torch.cat([mask[:, :30], torch.ones(2, extra, dtype=mask.dtype)], 1)
        model(
            junk[:, 30:],
            attention_mask=grown,
            position_ids=positions_of(grown)[:, 30:],
            past_key_values=cache,
        )
        cache.crop(-extra)
        assert cache.get_seq_length() == 30
        assert cache.layers[0].keys.shape[2] == 12 + RESERVE
        for start, stop in ((30, 31), (31, 50)):
            got = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions_of(mask)[:, start:stop],
                past_key_values=cache,
            ).logits
            torch.testing.assert_close(got, wanted[:, start:stop], atol=3e-5, rtol=1e-4)
            cache.crop(0)


def test_crop_within_the_window_needs_no_recording():
    model = attached(window=20, sink_tokens=3)
    ids = tokens(1, 30)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        _, cache = in_chunks(model, ids[:, :19], [19])
        cache.crop(-12)
        got, _ = in_chunks(model, ids[:, 7:], [23], cache=cache)
    torch.testing.assert_close(got, wanted[:, 7:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("removed", [1, RESERVE])
def test_crop_within_the_reserve_goes_back_exactly(removed, padded):
    model = attached(**WHOLE)
    ids = tokens(2, 45)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :11] = 0
    with torch.no_grad():
        wanted, _ = in_chunks(model, ids, [45], mask)
        for sizes in ([38], [20] + [1] * 18):
            _, cache = in_chunks(model, ids, sizes, mask)
            for _ in range(2):  # what was restored can be taken back no further
                cache.crop(-removed)
                start = cache.get_seq_length()
                for stop in (start + 1, start + removed):
                    begin = cache.get_seq_length()
                    if begin == stop:
                        continue
                    got = model(
                        ids[:, begin:stop],
                        attention_mask=mask[:, :stop],
                        position_ids=positions_of(mask)[:, begin:stop],
                        past_key_values=cache,
                    ).logits
                    torch.testing.assert_close(got, wanted[:, begin:stop], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_crop_beyond_the_window_is_refused_and_changes_nothing(padded):
    model = attached(**WHOLE)
    ids = tokens(2, 41)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        wanted, _ = in_chunks(model, ids, [41], mask)
        _, cache = in_chunks(model, ids, [40], mask)
        with pytest.raises(InvalidInputError, match="activate_past_recording"):
            cache.crop(-2 - RESERVE)
        with pytest.raises(InvalidInputError, match="pass a negative number"):
            cache.crop(5)
        with pytest.raises(InvalidInputError, match="holds 40 tokens only"):
            cache.crop(-41)
        got = model(
            ids[:, 40:],
            attention_mask=mask,
            position_ids=positions_of(mask)[:, 40:],
            past_key_values=cache,
        ).logits
    torch.testing.assert_close(got, wanted[:, 40:], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window,sinks", [(1, 0), (1, 2), (4, 0), (4, 3), (7, 2)])
def test_layers_hold_and_show_what_the_rule_needs_at_every_step(window, sinks, padded):
    """Random chunks, padding and rollbacks, with keys that say which token they are."""
    generator = torch.Generator().manual_seed(window + 10 * sinks)
    index, rows = WindowIndex(window, sinks), 3
    layer, counts = SinkWindowLayer(index), torch.zeros(3, dtype=torch.int64)
    for step in range(120):
        size = int(torch.randint(1, 6, (), generator=generator)) if step % 3 else 1
        mask = torch.rand(rows, size, generator=generator) < 0.7 if padded and step % 4 else None
        real = torch.ones(rows, size, dtype=torch.int64) if mask is None else mask.long()
        rank = counts[:, None] + real.cumsum(1) - 1
        query, shown, _, clear = index.advance(mask, size, torch.device("cpu"))
        states = torch.where(real > 0, rank + 1, -1)[:, None, :, None].float()
        keys, _ = layer.update(states, states)
        seen = visible(query, shown(), window, sinks).expand(rows, -1, -1)
        for row in range(rows):
            for i in (real[row] > 0).nonzero().flatten().tolist():
                r = int(rank[row, i])
                wanted = {x for x in range(r + 1) if x < sinks or x > r - window}
                got = keys[row, 0, :, 0] if clear else keys[row, 0, seen[row, i], 0]
                assert sorted(got.long().tolist()) == sorted(x + 1 for x in wanted)
        counts = counts + real.sum(1)
        assert layer.keys.shape[2] <= max(64, sinks + window + RESERVE)
        if step % 7 == 6 and index.valid is None:
            layer.crop(-1)
            index.__dict__.update(index.cropped(1, torch.device("cpu")).after.__dict__)
            counts = counts - 1


def test_deepcopy_and_pickle_of_a_cache_continue_alike():
    model = attached(**WHOLE)
    ids = tokens(1, 30)
    with torch.no_grad():
        wanted, _ = in_chunks(model, ids, [30])
        _, cache = in_chunks(model, ids, [20])
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            got, _ = in_chunks(model, ids[:, 20:], [10], cache=other)
            torch.testing.assert_close(got, wanted[:, 20:], atol=3e-5, rtol=1e-4)


def test_caches_that_cannot_work_are_refused():
    model, ids = attached(), tokens(1, 8)
    plain = build()
    filled = plain(ids, use_cache=True).past_key_values
    static = StaticCache(config=model.config, max_cache_len=32)
    for cache, message in (
        (filled, "already holds 8 tokens that rosakit never saw"),
        (static, "StaticLayer"),
        (((torch.zeros(1), torch.zeros(1)),), "needs a DynamicCache"),
        (DynamicCache(config=build(depth=2).config), None),
    ):
        with torch.no_grad():
            if message is None:
                model(ids, past_key_values=cache)  # a short list of empty layers is filled up
                continue
            with pytest.raises(InvalidInputError, match=message):
                model(ids, past_key_values=cache)
    with torch.no_grad():
        other = attached(window=5)(ids, use_cache=True).past_key_values
        with pytest.raises(InvalidInputError, match="another window"):
            model(ids, past_key_values=other)
        mine = model(ids, use_cache=True).past_key_values
        with pytest.raises(InvalidInputError, match="rows"):
            model(tokens(2, 3), past_key_values=mine)
        with pytest.raises(InvalidInputError, match="packed documents"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=True)
        with pytest.raises(InvalidInputError, match=r"the cache holds 8 and this input 2"):
            model(ids[:, :2], attention_mask=torch.ones(1, 2), past_key_values=mine)


def test_lazily_built_caches_work():
    model, ids = attached(**WHOLE), tokens(1, 20)
    with torch.no_grad():
        out = model(ids, past_key_values=DynamicCache())
        torch.testing.assert_close(out.logits, model(ids, use_cache=False).logits)
    assert isinstance(out.past_key_values.layers[0], SinkWindowLayer)


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it():
    model, ids = attached(**WHOLE), tokens(1, 30)
    with torch.inference_mode():
        _, cache = in_chunks(model, ids, [20, 1])
    with torch.no_grad():
        got = model(ids[:, 21:22], past_key_values=cache).logits
        wanted = model(ids[:, :22], use_cache=False).logits[:, 21:]
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)


def test_gradients_flow_through_a_cache():
    """Single steps with gradients: what an earlier step saw is not overwritten."""
    model, ids = attached(adapters=False, sink_tokens=2, window=3), tokens(1, 12)
    weight = model.model.layers[0].self_attn.v_proj.weight
    wanted = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), weight)[0]
    logits, _ = in_chunks(model, ids, [5] + [1] * 7)
    got = torch.autograd.grad(logits.square().sum(), weight)[0]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
