"""Several routes on one base: fewer candidates, refusals, and models left as they were."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate import make_needles, niah, perplexity
from rosakit.evaluate.routes import route_scorer
from rosakit.evaluate.scores import model_scorer
from rosakit.evaluate.variants import Task, measure_routes, route_of
from rosakit.tuning import RosaConfig, is_attached
from tests.evaluate.test_niah import Letters
from tests.tuning.tiny import attached, build, tokens

WINDOW = {"window": 9, "sink_tokens": 3, "adapters": False, "token_route": True}


def test_a_route_with_fewer_candidates_reads_the_best_ones():
    few = attached(adapters=False, token_route=True, token_candidates=2, noise=0.5)
    many = attached(adapters=False, token_route=True, token_candidates=5)
    ids = tokens(2, 60)
    expected = model_scorer(few)(ids)["model"]
    found = route_scorer(many, {"few": route_of(few)})(ids)["few"]
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.greedy, expected.greedy)


@pytest.mark.parametrize("options", [{"token_candidates": 6}, {"token_min_length": 2}])
def test_a_route_that_does_not_fit_is_refused(options):
    other = route_of(attached(adapters=False, token_route=True, **options))
    with pytest.raises(InvalidInputError, match="'other' needs"):
        route_scorer(attached(adapters=False, token_route=True), {"base": None, "other": other})


def test_measured_together_as_measured_alone():
    whole = attached(adapters=False, token_route=True, noise=0.5)
    model = build(vocab_size=128)
    documents = [tokens(1, n, seed=n)[0] for n in (60, 41)]
    needles = make_needles(Letters(), (260,), (0.0, 1.0), samples=1)
    task = Task({"text": documents}, (), 9, (0, 9, 30))
    found = measure_routes(
        build(), RosaConfig(**WINDOW), {"base": None, "rosa": route_of(whole)}, task
    )
    assert found["rosa"].perplexity["text"].ppl_by_position == pytest.approx(
        perplexity(whole, documents, edges=(0, 9, 30)).ppl_by_position, rel=1e-5
    )
    assert found["rosa"].niah is None

    full = {"window": None, "adapters": False, "token_route": True}
    task = Task({"text": documents}, needles, 200)
    base = measure_routes(model, RosaConfig(**full), {"base": None}, task)["base"]
    assert not is_attached(model)
    alone = niah(model, Letters(), (260,), (0.0, 1.0), samples=1, window=200)
    assert base.niah == alone
