"""Losses by the distance to the repetition, against a loop over all pairs of positions."""

from __future__ import annotations

import math

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.distance import measure_distance, perplexity_by_distance
from rosakit.evaluate.results import DistanceResult
from rosakit.evaluate.scores import LabelScores
from tests.tuning.tiny import build, tokens


def naive(ids, t, least):
    """Distance from position t to the end of the longest, latest repetition of its context."""
    best = (0, -1)
    for j in range(t):
        n = 0
        while n <= j and ids[j - n] == ids[t - n]:
            n += 1
        best = max(best, (n, j))
    return t - best[1] if best[0] >= least else 0


def test_every_token_lands_in_its_bucket():
    ids = tokens(1, 120, kinds=4, seed=3)[0]

    def scorer(row, mask=None, keep=None):
        # The loss of a token is a power of two of its own: sums say which ones were counted.
        value = -torch.arange(1.0, row.shape[1])[None]
        return {"a": LabelScores(value, value > 0)}

    found = measure_distance(scorer, [ids], [8, 32], min_length=3)["a"]
    expected = {"new": [], 8: [], 32: [], 120: []}
    for t in range(119):
        d = naive(ids.tolist(), t, 3)
        expected["new" if d == 0 else 8 if d < 8 else 32 if d < 32 else 120].append(t + 1.0)
    assert found.new.tokens == len(expected["new"])
    assert found.new.nll == pytest.approx(sum(expected["new"]))
    for bucket in found.buckets:
        assert bucket.tokens == len(expected[bucket.stop])
        assert bucket.nll == pytest.approx(sum(expected[bucket.stop]))
    far = expected[32] + expected[120]
    assert math.log(found.beyond(8)) == pytest.approx(sum(far) / len(far))


def test_a_model_is_measured_and_the_result_survives_json():
    import dataclasses
    import json

    found = perplexity_by_distance(build(depth=1), [tokens(1, 60)[0]], [8, 16])
    assert sum(b.tokens for b in found.buckets) + found.new.tokens == 59
    again = DistanceResult.from_dict(json.loads(json.dumps(dataclasses.asdict(found))))
    assert again == found


@pytest.mark.parametrize("edges", [[], [0, 4], [8, 4], [4, 4]])
def test_bad_edges_are_refused(edges):
    with pytest.raises(InvalidInputError, match="ascending edges"):
        perplexity_by_distance(build(depth=1), [tokens(1, 60)[0]], edges)
