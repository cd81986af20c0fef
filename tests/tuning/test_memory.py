"""What a cache is said to hold is what it holds, and plans come close."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from rosakit.errors import InvalidInputError
from rosakit.tuning import RosaConfig, attach, cache_memory, plan_memory
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
    assert found.device == held_by(cache)
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
        {"window": None},
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
