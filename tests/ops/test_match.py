"""`suffix_match`: backends against the oracle, masks, shapes, the operator's contract, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosakit import native
from rosakit.errors import BackendError, InvalidInputError, InvalidTypeError
from rosakit.ops import suffix_match
from tests.ops import brute
from tests.streams import FAMILIES, make

needs_core = pytest.mark.skipif(not native.available(), reason="compiled core missing")


def same(a, b):
    assert torch.equal(a.position, b.position)
    assert torch.equal(a.length, b.length)
    assert (a.cf_position is None) == (b.cf_position is None)
    if a.cf_position is not None:
        assert torch.equal(a.cf_position, b.cf_position)


@needs_core
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.sampled_from([0, 1, 2, 63, 130]),
    alphabet=st.sampled_from([2, 4, 16, 256]),
    family=st.sampled_from(FAMILIES),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    granularity=st.sampled_from(["token", "run"]),
    successor=st.sampled_from(["available", "strict"]),
    max_length=st.sampled_from([None, 1, 3, 32]),
    min_length=st.sampled_from([1, 2]),
    bits=st.sampled_from([0, 1, 4]),
    packed=st.booleans(),
)
def test_core_is_the_oracle(
    seed,
    length,
    alphabet,
    family,
    noise,
    granularity,
    successor,
    max_length,
    min_length,
    bits,
    packed,
):
    if min_length > (max_length or min_length):
        min_length = max_length
    generator = torch.Generator().manual_seed(seed)
    k = torch.stack(
        [torch.from_numpy(make(family, length, alphabet, seed % 97 + r)) for r in (0, 1)]
    )
    fresh = torch.randint(0, alphabet, k.shape, generator=generator)
    q = torch.where(torch.rand(k.shape, generator=generator) < noise, fresh, k)
    q, k = (x.to(torch.uint8)[None] for x in (q, k))
    starts = None
    if packed and length > 3:
        ids = torch.randint(0, 2, (1, length), generator=generator).cumsum(1) // max(1, length // 6)
        ids[:, -2:] = -1
        starts = ids
    options = {
        "granularity": granularity,
        "successor": successor,
        "max_length": max_length,
        "min_length": min_length,
        "counterfactual_bits": bits,
        "document_ids": starts,
    }
    same(
        suffix_match(q, k, backend="cpu", **options),
        suffix_match(q, k, backend="oracle", **options),
    )


@needs_core
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_dtypes_and_non_contiguous_input(dtype):
    x = torch.from_numpy(make("markov", 202, 7, seed=3)).to(dtype)
    strided = x[::2].reshape(1, 1, 101)
    assert not x[::2].is_contiguous()
    base = suffix_match(strided.to(torch.int32), strided.to(torch.int32), backend="oracle")
    same(suffix_match(strided, strided, backend="cpu"), base)
    transposed = strided.expand(2, 3, 101).transpose(0, 1)
    got = suffix_match(transposed, transposed, backend="cpu")
    assert torch.equal(got.position, base.position.expand(3, 2, 101))


def test_leading_shapes():
    x = torch.from_numpy(make("markov", 40, 4)).to(torch.uint8)
    flat = suffix_match(x, x, counterfactual_bits=2)
    assert flat.position.shape == (40,)
    assert flat.cf_position.shape == (40, 2)
    routes = suffix_match(x.expand(3, 40), x.expand(3, 40))
    assert torch.equal(routes.position, flat.position.expand(3, 40))
    batch = suffix_match(x.expand(2, 3, 40), x.expand(2, 3, 40))
    assert torch.equal(batch.length, flat.length.expand(2, 3, 40))


def test_masks_agree_with_running_alone():
    """Fault 5 of public code: padding and document boundaries are ignored."""
    x = torch.from_numpy(make("markov", 30, 4, seed=2)).to(torch.uint8)
    y = torch.from_numpy(make("period3", 18, 4)).to(torch.uint8)
    alone = [suffix_match(s, s) for s in (x, y)]
    left = torch.zeros(2, 1, 33, dtype=torch.uint8)
    mask = torch.zeros(2, 33, dtype=torch.long)
    for row, s in enumerate((x, y)):
        left[row, 0, 33 - len(s) :] = s
        mask[row, 33 - len(s) :] = 1
    got = suffix_match(left, left, attention_mask=mask)
    right = torch.zeros(2, 1, 33, dtype=torch.uint8)
    for row, s in enumerate((x, y)):
        right[row, 0, : len(s)] = s
    got_right = suffix_match(right, right, lengths=[30, 18])
    packed = torch.cat([x, y]).view(1, 1, -1)
    got_packed = suffix_match(packed, packed, cu_seqlens=[0, 30, 48])
    for row, s in enumerate((x, y)):
        n, pad = len(s), 33 - len(s)
        expected = alone[row].position
        shifted = torch.where(expected >= 0, expected + pad, -1)
        assert torch.equal(got.position[row, 0, pad:], shifted)
        assert (got.position[row, 0, :pad] == -1).all()
        assert torch.equal(got_right.position[row, 0, :n], expected)
        assert (got_right.length[row, 0, n:] == 0).all()
        begin = 30 * row
        assert torch.equal(
            got_packed.position[0, 0, begin : begin + n],
            torch.where(expected >= 0, expected + begin, -1),
        )


def test_current_run_does_not_hide_older_occurrences():
    """Fault 3 of public code: the current run is matchable and a self-match hides the rest."""
    x = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1], dtype=torch.uint8)
    match = suffix_match(x, x, granularity="run")
    assert match.position[-1] == 6
    assert match.length[-1] == 6


def test_length_survives_clones():
    """Fault 4 of public code: the match length is forgotten after a state is cloned.

    Every "01" after the first splits a state while the query sits inside it.
    """
    k = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.uint8)
    position, length, _ = brute.match_tokens(k.tolist(), k.tolist())
    assert max(length) == 5
    match = suffix_match(k, k)
    assert match.length.tolist() == length
    assert match.position.tolist() == position


@pytest.mark.parametrize("bits, starts", [(0, False), (2, True)])
def test_opcheck(bits, starts):
    x = torch.randint(0, 4, (2, 3, 17), dtype=torch.uint8)
    segment_starts = torch.zeros(2, 17, dtype=torch.int32) if starts else None
    torch.library.opcheck(
        torch.ops.rosakit.suffix_match.default,
        (x, x, segment_starts, "token", "available", 0, 1, bits, "auto"),
    )


def test_compiles_without_graph_breaks():
    def read(q, k):
        match = suffix_match(q, k, counterfactual_bits=2)
        return match.position + 1, match.cf_position

    x = torch.randint(0, 4, (1, 2, 30), dtype=torch.uint8)
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, x), read(x, x), strict=True):
        assert torch.equal(got, expected)


X = torch.zeros(1, 1, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (((X.float(), X.float()), {}), InvalidTypeError, "uint8, uint16, int32"),
        (((X, X.int()), {}), InvalidTypeError, "share dtype"),
        (((X, X[..., 1:]), {}), InvalidInputError, "one shape"),
        (((X[None], X[None]), {}), InvalidInputError, r"\[B, R, T\]"),
        (((X, X), {"granularity": "word"}), InvalidInputError, "granularity must be one of"),
        (((X, X), {"max_length": 0}), InvalidInputError, "max_length"),
        (((X, X), {"min_length": 0}), InvalidInputError, "min_length"),
        (((X, X), {"min_length": 3, "max_length": 2}), InvalidInputError, "nothing could"),
        (((X, X), {"counterfactual_bits": 9}), InvalidInputError, "do not have"),
        (((X, X), {"backend": "cuda"}), BackendError, "rosakit\\[cuda\\]"),
        (((X, X), {"attention_mask": torch.ones(2, 8)}), InvalidInputError, "expected \\[B, T\\]"),
        (((X, X), {"lengths": [9]}), InvalidInputError, "0..8"),
        (((X.int() - 1, X.int()), {}), InvalidInputError, "negative symbols"),
        (((X, X), {"segment_starts": torch.full((1, 8), 5)}), InvalidInputError, "neither starts"),
        (
            ((X, X), {"segment_starts": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])}),
            InvalidInputError,
            r"segment_starts\[0, 4\] = 1",
        ),
        (((X, X), {"cu_seqlens": [0, 5, 3]}), InvalidInputError, "rise from 0"),
        (
            ((X, X), {"lengths": [3], "cu_seqlens": [0, 8]}),
            InvalidInputError,
            "at most one of",
        ),
        (
            ((X, X), {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])}),
            InvalidInputError,
            "hole",
        ),
    ],
)
def test_bad_input_is_refused_with_the_remedy(arguments, error, message):
    (q, k), options = arguments
    with pytest.raises(error, match=message):
        suffix_match(q, k, **options)


def test_int64_tokens_are_narrowed_or_refused():
    ids = torch.tensor([5, 6, 5, 6, 5])
    assert suffix_match(ids, ids).position.tolist() == [-1, -1, 1, 2, 3]
    with pytest.raises(InvalidInputError, match="outside int32"):
        suffix_match(ids + 2**40, ids + 2**40)
