"""What a cache is said to hold is what it holds, and plans come close."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3Config

from rosakit.cuda.stream import bytes_a_symbol
from rosakit.errors import InvalidInputError
from rosakit.layers import device_state
from rosakit.layers import state as state_module
from rosakit.tuning import RosaConfig, attach, cache_memory, plan_memory
from tests.cuda import emulated
from tests.tuning.tiny import attached, build, tokens


def held_by(cache):
    return sum(
        x.numel() * x.element_size()
        for layer in cache.layers[:-1]
        for x in (layer.keys, layer.values)
    )


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_parts_add_up(rows):
    model = attached(token_route=True, global_layers=(1,))
    cache = model(tokens(rows, 200), use_cache=True).past_key_values
    found = cache_memory(cache)
    assert found.context == 200 * rows
    # Three layers copy q, k and v, 32 numbers by 32, in float32.
    assert found.copies == cache.layers[-1].states.copies.nbytes == 3 * 3 * 32 * 32 * 4
    assert found.device == held_by(cache) + found.copies
    assert found.full == 2 * 2 * 8 * 4 * 200 * rows
    plain = build()(tokens(rows, 200), use_cache=True).past_key_values
    assert found.plain == sum(2 * x.keys.numel() * 4 for x in plain.layers)
    states = cache.layers[-1].states
    assert found.host == states.nbytes
    assert found.total == found.device + found.host == found.to_dict()["total"]
    assert "of an ordinary cache" in str(found)


@torch.no_grad()
def test_a_windows_memory_does_not_grow_with_the_context():
    model = attached(adapters=False, window=9, sink_tokens=3)
    sizes = []
    for length in (100, 200, 400):
        found = cache_memory(model(tokens(1, length), use_cache=True).past_key_values)
        sizes.append((found.device, found.host))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"token_route": True, "adapters": False},
        {"layers": (0, 2), "routes": 3},
        {"address": "token", "global_layers": (1,)},
        {"address": "token", "address_candidates": 2, "far_distance": 20, "select": 8},
        {
            "address": "token",
            "far_distance": 20,
            "far_candidates": 4,
            "select": 8,
            "length_tiers": (1, 2),
        },
        {"window": None},
        {"routes": 2, "projection_rank": 3},
        {"routes": 2, "share_projections": True},
        {"routes": 4, "value_groups": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_plans_come_close(options):
    config = RosaConfig(**{"window": 9, "sink_tokens": 3, **options})
    model = attach(build(), config)
    cache = model(tokens(2, 3000 if config.window else 300), use_cache=True).past_key_values
    found, length = cache_memory(cache), cache.get_seq_length()
    plan = plan_memory(model.config, config, length, batch=2, dtype=torch.float32)
    assert (plan.window, plan.full, plan.plain) == (found.window, found.full, found.plain)
    model(tokens(2, 1), past_key_values=cache, use_cache=True)  # low-rank maps are copied by steps
    assert plan.copies == cache_memory(cache).copies
    if found.suffix:
        assert 0.3 < plan.suffix / found.suffix < 1.5
    # Tables are a place longer than what they hold.
    assert plan.history <= found.history < 1.05 * plan.history + 64


@torch.no_grad()
def test_what_is_no_cache_of_an_attached_model_is_refused():
    with pytest.raises(InvalidInputError, match="not the cache of an attached model"):
        cache_memory(build()(tokens(1, 5), use_cache=True).past_key_values)
    with pytest.raises(InvalidInputError, match="not the cache"):
        cache_memory(None)
    with pytest.raises(InvalidInputError, match="context=0"):
        plan_memory(build().config, RosaConfig(), 0)
    assert cache_memory(attached()(tokens(1, 2), past_key_values=DynamicCache()).past_key_values)


@torch.no_grad()
def test_states_on_a_gpu_are_counted_and_planned(monkeypatch):
    """They count as memory of the device, and plans come as close as tables grow."""
    emulated.stream_memory(monkeypatch)
    monkeypatch.setattr(state_module, "positions_on_device", lambda adapter, batch: None)
    config = RosaConfig(window=9, sink_tokens=3, routes=2)
    model = attach(build(), config)
    cache = model(tokens(2, 300), use_cache=True).past_key_values
    found = cache_memory(cache)
    assert found.suffix == found.history == 0
    assert found.states == cache.layers[-1].states.nbytes > 0
    assert found.device == held_by(cache) + found.states + found.copies
    plan = plan_memory(model.config, config, 300, batch=2, dtype=torch.float32, gpu=True)
    assert 0.85 < plan.states / found.states <= 1
    assert (plan.suffix, plan.history) == (0, 0)


SHAPE = Qwen3Config(
    hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8
)


@pytest.mark.parametrize(
    ("routes", "layers", "context", "batch", "stays"),
    [
        # A small share of an ordinary cache: at any length, for any batch.
        (56, None, 131072, 1, True),
        (56, None, 131072, 64, True),
        (512, tuple(range(0, 28, 4)), 524288, 1, True),
        (512, tuple(range(0, 28, 4)), 524289, 1, False),
        # A large one: up to 2 GiB of all layers and rows, 512 * 28 * 3.5 bytes a position.
        (512, None, 32768, 1, True),
        (512, None, 42799, 1, True),
        (512, None, 42800, 1, False),
        (512, None, 10699, 4, True),
        (512, None, 10700, 4, False),
    ],
)
def test_what_auto_keeps_on_a_gpu(routes, layers, context, batch, stays):
    config = RosaConfig(window=2048, routes=routes, layers=layers)
    plan = plan_memory(SHAPE, config, context, batch=batch, gpu=True)
    assert (plan.states > 0) == stays
    assert (plan.suffix > 0) != stays
    if plan.states > device_state.AUTO_SHARE * plan.plain:
        assert plan.states <= device_state.AUTO_BYTES
    elif stays:  # an eighth more while the tables grow
        assert plan.window + 1.125 * plan.states <= 0.15 * plan.plain
    assert plan_memory(SHAPE, config, context, batch=batch, gpu=False).states == 0


@torch.no_grad()
def test_plans_say_what_auto_does(monkeypatch):
    """The cache moves to the host where the plan says so, batch counted."""
    emulated.stream_memory(monkeypatch)

    def as_on_a_gpu(adapter, batch):
        return device_state.auto_positions(
            adapter.routes, adapter.bits, batch, adapter.peers, adapter.ordinary_bytes
        )

    monkeypatch.setattr(state_module, "positions_on_device", as_on_a_gpu)
    monkeypatch.setattr(device_state, "AUTO_SHARE", 0.0)
    # 20 positions of two rows: two layers of three routes.
    monkeypatch.setattr(device_state, "AUTO_BYTES", int(20 * 2 * 2 * 3 * bytes_a_symbol(4)))
    config = RosaConfig(window=9, sink_tokens=3, routes=3, layers=(0, 2))
    model = attach(build(), config)
    for rows, lengths in ((2, (19, 20, 21)), (1, (39, 40, 41))):
        cache, before = None, 0
        for length in lengths:
            out = model(tokens(rows, length - before), past_key_values=cache, use_cache=True)
            cache, before = out.past_key_values, length
            plan = plan_memory(
                model.config, config, length, batch=rows, dtype=torch.float32, gpu=True
            )
            found = cache_memory(cache)
            on_device = length < lengths[-1]
            assert (found.states > 0) == (plan.states > 0) == on_device
            assert (found.suffix > 0) == (plan.suffix > 0) == (not on_device)
