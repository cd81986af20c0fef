"""Health metrics against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rosakit.layers import TokenCandidates
from rosakit.ops import suffix_match
from rosakit.tuning.health import match_health, mean_health, symbol_health, token_route_health
from rosakit.types import Match


def test_token_matches_of_a_periodic_stream_agree_everywhere():
    ids = torch.arange(24)[None] % 6 + 3
    match = suffix_match(ids[:, None].int(), ids[:, None].int())
    found = match_health(match, ids, window=4)
    assert found["match_rate"] == pytest.approx(18 / 24)
    assert found["null_rate"] == pytest.approx(6 / 24)
    assert found["key_token"] == found["next_token"] == 1.0
    # The latest match of every position reads 5 tokens back, beyond a window of 4.
    assert found["beyond_window"] == 1.0
    assert match_health(match, ids, window=6)["beyond_window"] == 0.0
    assert found["match_length"] == pytest.approx(sum(range(1, 19)) / 18)
    assert "flip_change" not in found


def test_wrong_addresses_show():
    ids = torch.tensor([[5, 6, 7, 5, 8, 6]])
    position = torch.tensor([[[-1, -1, -1, 1, 2, 3]]], dtype=torch.int32)
    match = Match(position, (position > 0).int() * 2)
    found = match_health(match, ids)
    # Position 3 (5) matched key 0 (5): right key, but 6 is not the next token 8; position 4 (8)
    # matched key 1 (6), whose successor 7 is not 6; position 5 has no next token.
    assert found["key_token"] == pytest.approx(1 / 3)
    assert found["next_token"] == 0.0
    assert found["match_length"] == 2.0
    assert "beyond_window" not in found


def test_documents_and_padding_do_not_count():
    ids = torch.tensor([[3, 4, 3, 4, 3, 4]])
    starts = torch.tensor([[0, 0, 0, 3, 3, -1]], dtype=torch.int32)
    match = suffix_match(ids[:, None].int(), ids[:, None].int(), segment_starts=starts)
    found = match_health(match, ids, segment_starts=starts)
    assert found["match_rate"] == pytest.approx(1 / 5)
    # Position 2 is the last of its document: it has no next token there to agree with.
    assert found["next_token"] == 0.0
    padding = torch.full((1, 6), -1, dtype=torch.int32)
    assert match_health(match, ids, segment_starts=padding) == {}


def test_flips():
    match = Match(
        torch.tensor([[[-1, 1]]], dtype=torch.int32),
        torch.tensor([[[0, 1]]], dtype=torch.int32),
        torch.tensor([[[[-1, 1], [-1, 1]]]], dtype=torch.int32),
    )
    # Bits of position 0: unchanged, moved; of position 1: moved, unchanged.
    assert match_health(match, torch.tensor([[3, 3]]))["flip_change"] == 0.5


def test_entropy_of_routes():
    dead = torch.zeros(16, dtype=torch.uint8)
    full = torch.arange(16, dtype=torch.uint8)
    found = symbol_health(torch.stack([dead, full])[None], 4)
    assert found["entropy_worst"] == pytest.approx(0.0)
    assert found["entropy"] == pytest.approx(2.0)
    starts = torch.full((1, 16), -1, dtype=torch.int32)
    starts[:, :2] = 0
    assert symbol_health(full[None, None], 4, segment_starts=starts)["entropy"] == pytest.approx(1)


def test_token_route():
    token = torch.tensor([[[7, 8], [7, 0], [9, 0], [0, 0]]])
    length = torch.tensor([[[3, 1], [2, 0], [1, 0], [0, 0]]], dtype=torch.int32)
    keep = torch.tensor([[0.25, 0.5, 0.75, 1.0]]).log()
    labels = torch.tensor([[8, 7, 3, 0]])
    distance = torch.tensor([[[4, 9], [3, 9], [7, 0], [9, 9]]], dtype=torch.int32)
    candidates = TokenCandidates(token, length, distance)
    found = token_route_health(candidates, keep, labels, window=4)
    assert found["route_null_rate"] == pytest.approx(1 / 4)
    assert found["route_match_length"] == pytest.approx((3 + 2 + 1) / 3)
    # The best candidate's distance counts: 4 and 7 are out of sight, the empty place is not read.
    assert found["route_beyond_window"] == pytest.approx(2 / 3)
    assert "route_beyond_window" not in token_route_health(candidates, keep, labels)
    assert found["candidate_rate"] == pytest.approx(3 / 4)
    assert found["hit_rate"] == pytest.approx(2 / 3)
    # An empty place holds token 0: it must not count as a hit where the label is 0.
    assert found["first_hit_rate"] == pytest.approx(1 / 3)
    assert found["gate"] == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    ignored = torch.full_like(labels, -100)
    assert token_route_health(TokenCandidates(token, length, length), keep, ignored) == {}


def test_means_and_worst():
    found = mean_health([{"a": 1.0, "x_worst": 3.0}, {"a": 2.0, "x_worst": 1.0, "b": 5.0}])
    assert found == {"a": 1.5, "x_worst": 1.0, "b": 5.0}
    assert not any(math.isnan(v) for v in found.values())
