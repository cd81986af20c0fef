"""The token route: candidates, gate, mixture, control."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosakit import native
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.layers import TokenCandidates, TokenRoute
from rosakit.layers.token_match import (
    best_successors,
    best_successors_naive,
    gather_candidates,
)
from rosakit.layers.token_route import length_bucket, mixed_log_prob
from rosakit.ops import suffix_match
from tests.ops import brute


def candidates_of(ids, k=3):
    return gather_candidates(ids, best_successors(ids, k))


def definition(tokens, i, k):
    """Section 5 of the semantics: best distinct successors by (match length, position)."""
    ranked = sorted(((brute.lcs(tokens, tokens, i, j), j) for j in range(i)), reverse=True)
    out, seen = [], set()
    for length, j in ranked:
        if length and tokens[j + 1] not in seen:
            seen.add(tokens[j + 1])
            out.append((j + 1, length))
    return out[:k]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 4), min_size=1, max_size=40), k=st.integers(1, 5))
def test_naive_candidates_are_the_definition(tokens, k):
    position, length = best_successors_naive(torch.tensor([tokens]), k, None, 1)
    for i in range(len(tokens)):
        expected = definition(tokens, i, k)
        got = [
            (p, n) for p, n in zip(position[0, i].tolist(), length[0, i].tolist(), strict=True) if n
        ]
        assert got == expected


@pytest.mark.skipif(not native.available(), reason="compiled core missing")
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=120),
    k=st.integers(1, 6),
    min_length=st.integers(1, 3),
    split=st.integers(0, 120),
)
def test_core_candidates_are_naive(tokens, k, min_length, split):
    ids = torch.tensor([tokens])
    starts = torch.zeros(1, len(tokens), dtype=torch.int32)
    starts[:, split:] = split
    starts[:, -1:] = -1
    for segment_starts in (None, starts):
        got = best_successors(ids, k, segment_starts=segment_starts, min_length=min_length)
        position, length = best_successors_naive(ids, k, segment_starts, min_length)
        assert torch.equal(got.position, position)
        assert torch.equal(got.length, length)


def test_candidates_are_an_operator():
    ids = torch.randint(0, 5, (2, 20))
    torch.library.opcheck(torch.ops.rosakit.best_successors.default, (ids, 3, None, 1))
    compiled = torch.compile(
        lambda x: gather_candidates(x, best_successors(x, 3)), fullgraph=True, backend="aot_eager"
    )
    for got, expected in zip(compiled(ids), candidates_of(ids), strict=True):
        assert torch.equal(got, expected)


def test_first_candidate_is_the_match():
    ids = torch.randint(0, 6, (2, 50))
    found = best_successors(ids, 4)
    match = suffix_match(ids[:, None], ids[:, None])
    assert torch.equal(found.position[..., 0], match.position[:, 0])
    assert torch.equal(found.length[..., 0], match.length[:, 0])


@pytest.mark.parametrize("units", [0, 16])
def test_gate_starts_at_sigmoid_minus_three(units):
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (2, 60))
    found = candidates_of(ids)
    route = TokenRoute(8, candidates=3, units=units)
    hidden, log_p = torch.randn(2, 60, 8), -torch.rand(2, 60, 3)
    keep, copy = route.gate(hidden, log_p, found)
    has_any = (found.length > 0).any(-1)
    total = copy.exp().sum(-1)
    expected = torch.where(has_any, torch.sigmoid(torch.tensor(-3.0)), torch.tensor(0.0))
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(keep.exp() + total, torch.ones_like(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixture_is_the_formula(dtype):
    torch.manual_seed(1)
    ids = torch.randint(0, 7, (2, 40))
    found = candidates_of(ids)
    route = TokenRoute(8, candidates=3)
    for parameter in route.parameters():
        torch.nn.init.normal_(parameter)
    hidden, logits = torch.randn(2, 40, 8), (3 * torch.randn(2, 40, 7)).to(dtype)
    p = logits.double().softmax(-1)
    log_p = logits.float().log_softmax(-1).gather(-1, found.token)
    keep, copy = route.gate(hidden, log_p, found)
    expected = keep.double().exp()[..., None] * p
    expected = expected.scatter_add(-1, found.token, copy.double().exp())
    got = route(hidden, logits, found)
    assert got.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double().exp(), expected, atol=tolerance, rtol=tolerance)
    if dtype != torch.bfloat16:
        torch.testing.assert_close(
            got.double().exp().sum(-1), torch.ones(2, 40, dtype=torch.double), atol=1e-5, rtol=0
        )


def test_position_without_candidates_keeps_the_model():
    route = TokenRoute(4, candidates=2)
    logits = torch.randn(1, 3, 5)
    empty = TokenCandidates(
        *(torch.zeros(1, 3, 2, dtype=d) for d in (torch.int64, torch.int32, torch.int32))
    )
    torch.testing.assert_close(route(torch.randn(1, 3, 4), logits, empty), logits.log_softmax(-1))


def test_gradients_are_finite_and_reach_everything():
    torch.manual_seed(3)
    ids = torch.randint(0, 5, (1, 50))
    route = TokenRoute(6, candidates=3)
    with torch.no_grad():
        route.unit_score.normal_()
    hidden = torch.randn(1, 50, 6)
    logits = torch.randn(1, 50, 5, requires_grad=True)
    out = route(hidden, logits, candidates_of(ids))
    torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:]).backward()
    for name, parameter in [("logits", logits), *route.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_control_keeps_features_and_loses_the_past():
    """Every candidate of the control is the position's own token; equal tokens add up."""
    torch.manual_seed(4)
    ids = torch.randint(0, 4, (1, 30))
    route = TokenRoute(6, candidates=3, retrieve=False)
    found = candidates_of(ids)
    own = route.own_value_candidates(ids, found)
    assert torch.equal(own.length, found.length)
    filled = own.length > 0
    assert torch.equal(own.token[filled], ids[..., None].expand_as(own.token)[filled])
    logits = torch.randn(1, 30, 4)
    out = route(torch.randn(1, 30, 6), logits, own).exp()
    total = torch.where(filled.any(-1), torch.sigmoid(torch.tensor(-3.0)), torch.tensor(0.0))
    expected = (1 - total)[..., None] * logits.softmax(-1)
    expected = expected.scatter_add(-1, ids[..., None], total[..., None])
    torch.testing.assert_close(out, expected)


def test_length_buckets_are_half_octaves():
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 2**20])
    assert length_bucket(lengths).tolist() == [0, 0, 2, 3, 4, 4, 5, 5, 6, 8, 23]
    powers = 2 ** torch.arange(11)
    assert length_bucket(powers).tolist() == [2 * n for n in range(11)]


def test_route_learns_to_copy():
    """A deterministic cycle: the gate opens and the loss falls below the frozen model's."""
    torch.manual_seed(5)
    ids = torch.arange(200)[None] % 17
    route = TokenRoute(4, candidates=2)
    hidden, logits = torch.randn(1, 200, 4), torch.zeros(1, 200, 17)
    found = candidates_of(ids, 2)
    optimizer = torch.optim.Adam(route.parameters(), lr=0.1)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(route(hidden, logits, found)[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 < math.log(17)


def test_bad_input():
    with pytest.raises(InvalidTypeError, match="integers"):
        best_successors(torch.rand(1, 4), 1)
    with pytest.raises(InvalidInputError, match=r"\[B, T\]"):
        best_successors(torch.zeros(4, dtype=torch.long), 1)
    with pytest.raises(InvalidInputError, match="candidates"):
        best_successors(torch.zeros(1, 4, dtype=torch.long), 0)
    with pytest.raises(InvalidInputError, match="candidates >= 1"):
        TokenRoute(4, candidates=0)
    with pytest.raises(InvalidInputError, match="do not fit hidden states"):
        TokenRoute(4)(
            torch.randn(1, 3, 4),
            torch.randn(1, 3, 5),
            candidates_of(torch.zeros(1, 4, dtype=torch.long), 4),
        )


@pytest.mark.parametrize("repeated", [False, True])
def test_chosen_tokens_have_the_log_probability_of_the_whole_distribution(repeated):
    """Also where several places hold one token, as the control's do."""
    torch.manual_seed(2)
    ids = torch.randint(0, 7, (2, 40))
    found = candidates_of(ids)
    route = TokenRoute(8, candidates=3)
    for parameter in route.parameters():
        torch.nn.init.normal_(parameter)
    if repeated:
        found = route.own_value_candidates(ids, found)
    hidden, logits = torch.randn(2, 40, 8), 3 * torch.randn(2, 40, 7)
    log_p = logits.log_softmax(-1)
    gates = route.gate(hidden, log_p.gather(-1, found.token), found)
    everything = torch.arange(7).expand(2, 40, 7)
    got = mixed_log_prob(everything, log_p, *gates, found)
    torch.testing.assert_close(got, route(hidden, logits, found))
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 40))
