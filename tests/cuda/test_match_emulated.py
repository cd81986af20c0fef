"""The matching kernel, run on the CPU, against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit.ops.oracle import suffix_match_oracle
from tests import streams
from tests.cuda import emulated

FAMILIES = (*streams.FAMILIES, "noisy_constant", "noisy_query")


def pairs(length: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """q and k ``[1, families, length]``, uint8."""
    rng = np.random.default_rng(seed)
    alphabet = 1 << bits
    rows = []
    for name in FAMILIES:
        if name == "noisy_constant":
            k = (rng.random(length) > 0.03).astype(np.int64)
            rows.append((k, k))
        elif name == "noisy_query":
            k = streams.make("markov", length, alphabet, seed)
            q = np.where(rng.random(length) < 0.05, rng.integers(0, alphabet, length), k)
            rows.append((q, k))
        elif name == "random":
            rows.append(tuple(rng.integers(0, alphabet, (2, length))))
        else:
            k = streams.make(name, length, alphabet, seed)
            rows.append((k, k))
    q, k = (np.stack(x).astype(np.uint8)[None] for x in zip(*rows, strict=True))
    return q, k


def segments(length: int, seed: int) -> np.ndarray:
    """Documents of about 50 positions, with padding on both sides: ``[1, length]``."""
    rng = np.random.default_rng(seed)
    starts = np.full((1, length), -1, dtype=np.int32)
    at = length // 10
    while at < length - length // 10:
        end = min(length - length // 10, at + int(rng.integers(1, 100)))
        starts[0, at:end] = at
        at = end
    return starts


def check(length, bits, flips, seed, segment_starts=None, **options):
    q, k = pairs(length, bits, seed)
    names = ("granularity", "successor", "max_length", "min_length")
    rules = {key: options[key] for key in names if key in options}
    expected = suffix_match_oracle(
        torch.from_numpy(q),
        torch.from_numpy(k),
        segment_starts=None if segment_starts is None else torch.from_numpy(segment_starts),
        counterfactual_bits=flips,
        **rules,
    )
    position, size, flipped = emulated.match(
        q, k, flips=flips, segment_starts=segment_starts, **options
    )
    for row, name in enumerate(FAMILIES):
        assert np.array_equal(position[0, row], expected.position[0, row]), f"{name}: position"
        assert np.array_equal(size[0, row], expected.length[0, row]), f"{name}: length"
        if flips:
            assert np.array_equal(flipped[0, row], expected.cf_position[0, row]), f"{name}: flips"


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_default_options(length):
    check(length, bits=4, flips=4, seed=length)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_length": 2}, id="max2"),
        pytest.param({"max_length": 7}, id="max7"),
        pytest.param({"min_length": 4}, id="min4"),
        pytest.param({"min_length": 3, "max_length": 11}, id="min3-max11"),
    ],
)
@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
def test_length_limits_and_documents(options, depth, packed):
    starts = segments(200, depth) if packed else None
    check(200, 2, 4, depth, segment_starts=starts, min_depth=depth, max_depth=depth, **options)


@pytest.mark.parametrize("depth", [2, 12])
@pytest.mark.parametrize("bits, flips", [(1, 4), (4, 4), (6, 8), (8, 8)])
def test_alphabets(bits, flips, depth):
    check(150, bits, flips, bits, min_depth=depth, max_depth=depth)
    limits = {"min_length": 3, "max_length": 9}
    check(70, bits, flips, bits, min_depth=depth, max_depth=depth, **limits)


@pytest.mark.parametrize("bits, flips", [(4, 0), (8, 0), (4, 4), (2, 3)])
@pytest.mark.parametrize("narrow", [False, True])
def test_everything_in_global_memory(bits, flips, narrow):
    places = {"shared": False, "narrow": narrow}
    check(220, bits, flips, bits, **places)
    starts = segments(220, bits)
    check(220, bits, flips, bits, segment_starts=starts, warp_search=512, **places)


@pytest.mark.parametrize(
    "options", [{"max_length": 3}, {"min_length": 4}, {"min_length": 2, "max_length": 9}]
)
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_flips_that_are_noted_first(options, depth):
    """In global memory a flip is noted level by level and its entry read once."""
    places = {"shared": False, "min_depth": depth, "max_depth": depth}
    check(100, 2, 4, depth, **places, **options)
    check(100, 4, 4, depth, segment_starts=segments(100, depth), **places, **options)


@pytest.mark.parametrize("near", [0, 3, 60])
@pytest.mark.parametrize("options", [{}, {"max_length": 6}, {"min_length": 3}])
def test_positions_with_few_candidates_are_finished_alone(near, options):
    """However early the levels stop, single threads, walks and searches add up to the match."""
    rules = {"near": near, "min_depth": 1, **options}
    for bits in (1, 4):
        check(180, bits, 0, near, **rules)
        check(130, bits, 0, near, segment_starts=segments(130, near), shared=False, **rules)


@pytest.mark.parametrize("dtype, bits", [(np.uint16, 3), (np.uint16, 13), (np.int32, 18)])
@pytest.mark.parametrize("depth", [2, 6])
def test_wide_symbols(dtype, bits, depth):
    """uint16 symbols and token ids: as many digits as the route uses."""
    rng = np.random.default_rng(bits)
    names = rng.permutation(1 << bits)[:24]
    q, k = (names[x % len(names)].astype(dtype) for x in pairs(110, 5, bits))
    flips = 0 if dtype == np.int32 else bits
    for rules in ({}, {"segment_starts": segments(110, 1)}, {"min_length": 2, "max_length": 7}):
        starts = rules.get("segment_starts")
        expected = suffix_match_oracle(
            torch.from_numpy(q),
            torch.from_numpy(k),
            counterfactual_bits=flips,
            **{**rules, "segment_starts": None if starts is None else torch.from_numpy(starts)},
        )
        got = emulated.match(q, k, flips=flips, min_depth=depth, max_depth=depth, **rules)
        for name, mine, right in zip(expected._fields, got, expected, strict=True):
            if right is not None:
                assert np.array_equal(mine, right.numpy()), (name, list(rules))


@pytest.mark.parametrize("successor", ["available", "strict"])
@pytest.mark.parametrize("length, bits, flips", [(1, 4, 4), (2, 4, 0), (130, 1, 4), (200, 4, 4)])
@pytest.mark.parametrize("depth", [2, 7])
def test_runs(successor, length, bits, flips, depth):
    options = {"granularity": "run", "successor": successor, "min_depth": depth, "max_depth": depth}
    check(length, bits, flips, length, **options)
    if length > 100:
        check(length, bits, flips, 1, segment_starts=segments(length, 3), **options)
        check(length, 8, 8, 2, max_length=5, min_length=2, **options)


def test_long_runs_reach_the_search():
    """Long enough for candidates that are shorter than the best match found so far."""
    check(700, 1, 1, 1000, granularity="run", min_depth=2, max_depth=3)
