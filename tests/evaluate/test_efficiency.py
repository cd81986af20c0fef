"""Cost of a context: a window holds less than full attention, and what is counted is there."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.efficiency import cache_bytes, efficiency
from rosakit.tuning import RosaConfig, attach
from tests.tuning.tiny import build, tokens


def test_a_window_holds_less_however_long_the_context():
    full = efficiency(build(depth=2), [64, 256], steps=3, repeats=1)
    windowed = attach(build(depth=2), RosaConfig(window=16, adapters=False))
    bounded = efficiency(windowed, [64, 256], steps=3, repeats=1)
    assert full[1].cache_bytes == 4 * full[0].cache_bytes
    # 16 - 1 tokens of the window, 4 sinks and 64 for rollbacks at most.
    assert bounded[1].cache_bytes <= full[1].cache_bytes * (16 + 4 + 64) / 256
    for entry in (*full, *bounded):
        assert entry.prefill_seconds > 0
        assert entry.decode_ms > 0
        assert entry.peak_bytes is None


def test_keys_values_and_states_are_counted():
    model = attach(build(depth=2), RosaConfig(window=None, adapters=False, token_route=True))
    with torch.no_grad():
        cache = model(input_ids=tokens(1, 40), use_cache=True).past_key_values
    keys = 2 * 2 * 40 * 2 * 8 * 4  # layers, keys and values, tokens, heads, width, bytes
    assert cache_bytes(cache) == keys + cache.layers[-1].states.nbytes
    assert cache.layers[-1].states.nbytes > 0


def test_bad_sizes_are_refused():
    with pytest.raises(InvalidInputError, match="efficiency needs"):
        efficiency(build(depth=1), [])
