"""The oracle against the definition written as quantifiers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosakit.ops.oracle import suffix_match_oracle
from tests.ops import brute
from tests.streams import FAMILIES, make


def stream(values, dtype=torch.uint8):
    return torch.tensor(values, dtype=dtype).view(1, 1, -1)


def agree(q, k, granularity, successor, max_length, min_length, bits):
    match = suffix_match_oracle(
        stream(q),
        stream(k),
        granularity=granularity,
        successor=successor,
        max_length=max_length,
        min_length=min_length,
        counterfactual_bits=bits,
    )
    options = {"bits": bits, "max_length": max_length, "min_length": min_length}
    if granularity == "token":
        position, length, flipped = brute.match_tokens(q, k, **options)
    else:
        position, length, flipped = brute.match_runs(q, k, successor=successor, **options)
    assert match.position[0, 0].tolist() == position
    assert match.length[0, 0].tolist() == length
    if bits:
        assert match.cf_position[0, 0].tolist() == flipped


@settings(max_examples=120, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=24),
    tied=st.booleans(),
    granularity=st.sampled_from(["token", "run"]),
    successor=st.sampled_from(["available", "strict"]),
    max_length=st.sampled_from([None, 1, 2, 5]),
    min_length=st.sampled_from([1, 2]),
    bits=st.sampled_from([0, 2]),
)
def test_oracle_is_the_definition(
    pairs, tied, granularity, successor, max_length, min_length, bits
):
    q = [a for a, _ in pairs]
    k = q if tied else [b for _, b in pairs]
    agree(q, k, granularity, successor, max_length, min_length, bits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["token", "run"])
def test_families(family, granularity):
    q = make(family, 40, 4, seed=1).tolist()
    agree(q, q, granularity, "available", None, 1, 2)
    agree(q, [q[-1], *q[:-1]], granularity, "available", None, 1, 2)


def test_published_strict_rule_swallows_self_matches():
    """Semantics 2.1: with q == k every position of the strict rule is null."""
    x = stream(make("markov", 60, 4).tolist())
    strict = suffix_match_oracle(x, x, granularity="run", successor="strict")
    assert (strict.position == -1).all()
    available = suffix_match_oracle(x, x, granularity="run", successor="available")
    assert (available.position >= 0).any()


def test_segments_are_sequences_of_their_own():
    x = torch.from_numpy(make("markov", 50, 4)).to(torch.uint8)
    y = torch.from_numpy(make("repeats", 30, 4)).to(torch.uint8)
    row = torch.cat([x, y]).view(1, 1, -1)
    starts = torch.tensor([[0] * 50 + [50] * 27 + [-1] * 3], dtype=torch.int32)
    for granularity in ("token", "run"):
        options = {"granularity": granularity, "counterfactual_bits": 2}
        packed = suffix_match_oracle(row, row, segment_starts=starts, **options)
        first = suffix_match_oracle(x.view(1, 1, -1), x.view(1, 1, -1), **options)
        second = suffix_match_oracle(y[:27].view(1, 1, -1), y[:27].view(1, 1, -1), **options)
        assert torch.equal(packed.position[..., :50], first.position)
        shifted = torch.where(second.position >= 0, second.position + 50, -1)
        assert torch.equal(packed.position[..., 50:77], shifted)
        assert torch.equal(packed.length[..., 50:77], second.length)
        assert (packed.position[..., 77:] == -1).all()
        assert (packed.cf_position[..., 77:, :] == -1).all()
