"""The core's whole-sequence matcher against the oracle and the published vectors."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosakit import native
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops.oracle import suffix_match_oracle

from .streams import FAMILIES, draw

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled core is not built")

GOLDEN = Path(os.environ.get("ROSAKIT_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
DTYPES = {"uint8": 256, "uint16": 65536, "int32": 2**31}


def oracle(q, k, **options):
    starts = options.pop("segment_starts", None)
    found = suffix_match_oracle(
        torch.from_numpy(q.astype(np.int64)),
        torch.from_numpy(k.astype(np.int64)),
        segment_starts=None if starts is None else torch.from_numpy(starts),
        **options,
    )
    return [None if x is None else x.numpy() for x in found]


def assert_same(q, k, **options):
    got = native.match(q, k, **options)
    want = oracle(q, k, **options)
    for name, g, w in zip(("position", "length", "cf_position"), got, want, strict=True):
        if w is None:
            assert g is None
            continue
        np.testing.assert_array_equal(g, w, err_msg=f"{name} with {options}")


@st.composite
def cases(draw_from):
    family = draw_from(st.sampled_from(FAMILIES))
    n = draw_from(st.sampled_from([1, 2, 3, 17, 40, 63, 120]))
    dtype = draw_from(st.sampled_from(list(DTYPES)))
    alphabet = draw_from(st.sampled_from([2, 3, 4, 16, 17, 40]))
    q, k = draw(family, n, alphabet, draw_from(st.integers(0, 2**32 - 1)))
    if draw_from(st.booleans()):  # the largest legal symbols
        top = DTYPES[dtype] - 1
        q, k = top - q, top - k
    options = {
        "granularity": draw_from(st.sampled_from(["token", "run"])),
        "successor": draw_from(st.sampled_from(["available", "strict"])),
        "max_length": draw_from(st.sampled_from([None, None, 1, 2, 5])),
        "min_length": draw_from(st.sampled_from([1, 1, 2, 4])),
        "counterfactual_bits": draw_from(st.sampled_from([0, 1, 4, 8])),
    }
    if draw_from(st.booleans()):
        cuts = sorted({0, *draw_from(st.lists(st.integers(0, n - 1), max_size=3))})
        starts = np.zeros((1, n), np.int32)
        for cut in cuts:
            starts[0, cut:] = cut
        padding = draw_from(st.sampled_from([0, 0, len(cuts)]))
        if padding:
            starts[starts == cuts[padding - 1]] = -1
        options["segment_starts"] = starts
    return q[None, None].astype(dtype), k[None, None].astype(dtype), options


@given(cases())
@settings(max_examples=400, deadline=None)
def test_equals_oracle(case):
    q, k, options = case
    assert_same(q, k, **options)


@pytest.mark.parametrize("granularity", ["token", "run"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_oracle_on_longer_streams(family, granularity):
    pairs = [draw(family, 1500, alphabet, 7) for alphabet in (2, 16)]
    q, k = (np.stack([p[s] for p in pairs])[None].astype(np.uint8) for s in (0, 1))
    assert_same(q, k, granularity=granularity, counterfactual_bits=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_alphabets(dtype):
    rng = np.random.default_rng(3)
    pool = rng.integers(0, DTYPES[dtype], 60)
    k = pool[rng.integers(0, 60, (1, 2, 400))].astype(dtype)
    q = k.copy()
    q[0, 1, ::7] = rng.integers(0, DTYPES[dtype], q[0, 1, ::7].shape)
    assert_same(q, k, counterfactual_bits=8)


def test_batch_rows_and_routes_are_independent():
    rng = np.random.default_rng(0)
    q, k = (rng.integers(0, 4, (3, 5, 100)).astype(np.uint8) for _ in range(2))
    position, length, flipped = native.match(q, k, counterfactual_bits=2)
    for b in range(3):
        for r in range(5):
            one = native.match(
                q[b : b + 1, r : r + 1], k[b : b + 1, r : r + 1], counterfactual_bits=2
            )
            np.testing.assert_array_equal(position[b, r], one[0][0, 0])
            np.testing.assert_array_equal(length[b, r], one[1][0, 0])
            np.testing.assert_array_equal(flipped[b, r], one[2][0, 0])


def test_empty_streams():
    position, length, flipped = native.match(
        *np.zeros((2, 1, 3, 0), np.uint8), counterfactual_bits=2
    )
    assert position.shape == length.shape == (1, 3, 0)
    assert flipped.shape == (1, 3, 0, 2)


@pytest.mark.parametrize("name", ["stream_rosa", "stream_qkv"])
def test_published_vectors(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no golden data at {path}")
    with np.load(path) as data:
        offsets = data["offsets"]
        for begin, end in itertools.pairwise(offsets):
            if name == "stream_rosa":
                q = k = v = data["x"][begin:end].astype(np.uint16)
                want = data["y"][begin:end]
            else:
                q, k, v = (data[x][begin:end] for x in "qkv")
                want = data["y_raw"][begin:end]
            v = v.astype(np.int32)
            position, _, _ = native.match(q[None, None], k[None, None])
            found = position[0, 0]
            np.testing.assert_array_equal(np.where(found >= 0, v[found], -1), want)
            if name == "stream_qkv":
                np.testing.assert_array_equal(found, data["pos"][begin:end])


def test_published_lengths():
    path = GOLDEN / "stream_slow4.npz"
    if not path.exists():
        pytest.skip(f"no golden data at {path}")
    with np.load(path) as slow, np.load(GOLDEN / "stream_qkv.npz") as data:
        offsets = slow["offsets"]
        for case, begin, end in zip(slow["case"], offsets[:-1], offsets[1:], strict=True):
            at = slice(data["offsets"][case], data["offsets"][case + 1])
            _, length, _ = native.match(data["q"][at][None, None], data["k"][at][None, None])
            np.testing.assert_array_equal(length[0, 0], slow["ln"][begin:end])


@given(
    st.sampled_from(FAMILIES), st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 30]),
    st.integers(1, 5), st.sampled_from([None, 3]), st.sampled_from([1, 2]), st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_best_successors_equal_brute_force(family, seed, alphabet, candidates, cap, least, cut):
    n = 60
    tokens = draw(family, n, alphabet, seed)[1].astype(np.int32)[None]
    starts = None
    if cut:
        starts = np.full((1, n), 25, np.int32)
        starts[0, :20] = 0
        starts[0, 20:25] = -1
    position, length = native.best_successors(
        tokens, candidates, segment_starts=starts, min_length=least, max_length=cap
    )
    x = tokens[0].tolist()
    for i in range(n):
        begin = 0 if starts is None else int(starts[0, i])
        want: list[tuple[int, int]] = []
        if begin >= 0:
            found = []
            for j in range(begin, i):
                size = 0
                while j - size >= begin and x[j - size] == x[i - size]:
                    size += 1
                found.append((min(size, cap or size), j + 1))
            seen = set()
            for size, at in sorted(found, reverse=True):
                if size >= least and x[at] not in seen and len(want) < candidates:
                    seen.add(x[at])
                    want.append((at, size))
        want += [(-1, 0)] * (candidates - len(want))
        assert list(zip(position[0, i].tolist(), length[0, i].tolist(), strict=True)) == want


@pytest.mark.parametrize("period", [1, 3])
def test_best_successors_of_a_long_periodic_stream(period):
    """Past the budget of the walks latest ends come from the link-cut tree, and a token with one
    continuation ends the search for others."""
    n = 20_000
    tokens = (np.arange(n, dtype=np.int32) % period)[None]
    position, length = native.best_successors(tokens, 4)
    at = np.arange(n)
    found = at >= period
    np.testing.assert_array_equal(position[0, :, 0], np.where(found, at - period + 1, -1))
    np.testing.assert_array_equal(length[0, :, 0], np.where(found, at - period + 1, 0))
    assert (position[0, :, 1:] == -1).all()
    assert (length[0, :, 1:] == 0).all()


def test_wrong_input_is_refused():
    x = np.zeros((1, 1, 4), np.uint8)
    with pytest.raises(InvalidTypeError, match="float32"):
        native.match(x.astype(np.float32), x)
    with pytest.raises(InvalidTypeError, match="uint16"):
        native.match(x, x.astype(np.uint16))
    with pytest.raises(InvalidInputError, match=r"\[B, R, T\]"):
        native.match(x[0], x[0])
    with pytest.raises(InvalidInputError, match="max_length"):
        native.match(x, x, max_length=0)
    with pytest.raises(InvalidInputError, match="counterfactual_bits"):
        native.match(x, x, counterfactual_bits=9)
    with pytest.raises(InvalidInputError, match="segment_starts"):
        native.match(x, x, segment_starts=np.zeros((2, 4), np.int32))
    with pytest.raises(InvalidInputError, match="negative"):
        native.match(x.astype(np.int32) - 1, x.astype(np.int32))
    with pytest.raises(InvalidInputError, match="candidates"):
        native.best_successors(x[0].astype(np.int32), 0)


def test_too_long_streams_are_refused_without_allocating():
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (1, 1, 2**31), (0, 0, 0))
    with pytest.raises(InvalidInputError, match="2\\^31"):
        native.match(x, x)
