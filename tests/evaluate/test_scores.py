"""Perplexity and scores against the obvious computation."""

from __future__ import annotations

import math

import pytest
import torch

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.evaluate import perplexity, position_edges
from rosakit.evaluate import scores as module
from rosakit.evaluate.perplexity import measure_perplexity
from rosakit.evaluate.scores import model_scorer, score_labels
from tests.tuning.tiny import attached, build, tokens


def documents():
    return [tokens(1, n, seed=n)[0] for n in (40, 7, 33, 40, 2)]


def token_losses(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity_is_token_weighted_and_bucketed(batch_size):
    model = build()
    found = perplexity(model, documents(), edges=(0, 8, 32), batch_size=batch_size)
    losses = [token_losses(model, ids) for ids in documents()]
    assert found.documents == 5
    assert found.tokens == sum(map(len, losses))
    expected = {"0-8": (1, 8), "8-32": (8, 32), "32-40": (32, 40)}  # tokens before the target
    assert list(found.ppl_by_position) == list(expected)
    for label, (start, stop) in expected.items():
        part = torch.cat([x[start - 1 : stop - 1] for x in losses])
        assert found.ppl_by_position[label] == pytest.approx(part.mean().exp().item(), rel=1e-5)
    everything = torch.cat(losses).mean().exp().item()
    assert found.ppl == pytest.approx(everything, rel=1e-5)
    late = torch.cat([x[7:] for x in losses]).mean().exp().item()
    assert found.beyond(8) == pytest.approx(late, rel=1e-5)


def test_perplexity_of_an_attached_model_in_batches():
    model = attached(token_route=True)
    one = perplexity(model, documents(), edges=(0, 8))
    many = perplexity(model, documents(), edges=(0, 8), batch_size=4)
    assert many.ppl_by_position == pytest.approx(one.ppl_by_position, rel=1e-5)


def test_perplexity_leaves_the_model_in_its_mode():
    model = build().train()
    perplexity(model, documents())
    assert model.training
    assert torch.is_grad_enabled()


def test_scores_do_not_depend_on_the_chunk(monkeypatch):
    logits = torch.randn(2, 9, 11, dtype=torch.bfloat16)
    labels = torch.randint(0, 11, (2, 9))
    whole = score_labels(logits, labels)
    monkeypatch.setattr(module, "_CHUNK", 50)
    parts = score_labels(logits, labels)
    assert torch.equal(whole.log_prob, parts.log_prob)
    assert torch.equal(whole.greedy, parts.greedy)
    assert torch.equal(whole.greedy, logits.argmax(-1) == labels)
    expected = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(whole.log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_route", [False, True])
def test_scores_of_the_last_tokens_only(token_route):
    score = model_scorer(attached(token_route=token_route))
    ids = tokens(2, 30)
    whole, part = score(ids)["model"], score(ids, keep=5)["model"]
    assert part.log_prob.shape == (2, 5)
    torch.testing.assert_close(part.log_prob, whole.log_prob[:, -5:])
    assert torch.equal(part.greedy, whole.greedy[:, -5:])


def test_progress_counts_documents():
    seen = []
    perplexity(build(), documents(), batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [("perplexity", 2, 5), ("perplexity", 4, 5), ("perplexity", 5, 5)]


def test_position_edges_double_from_the_window():
    assert position_edges(2048) == (0, 256, 512, 1024, 2048)
    assert position_edges(300, 256) == (0, 256, 300)
    assert position_edges(100) == (0, 100)


@pytest.mark.parametrize(
    ("given", "options", "error"),
    [
        ([], {}, InvalidInputError),
        ([[3]], {}, InvalidInputError),
        ([[[3, 4]]], {}, InvalidInputError),
        ([[3.0, 4.0]], {}, InvalidTypeError),
        ([[3, 4]], {"edges": (1, 2)}, InvalidInputError),
        ([[3, 4]], {"edges": (0, 5, 5)}, InvalidInputError),
        ([[3, 4]], {"batch_size": 0}, InvalidInputError),
    ],
)
def test_bad_input(given, options, error):
    with pytest.raises(error):
        perplexity(build(depth=1), given, **options)


def test_an_empty_bucket_has_no_perplexity():
    found = measure_perplexity(model_scorer(build(depth=1)), [[3, 4, 5]], edges=(0, 8, 16))
    assert math.isnan(found["model"].buckets[1].ppl)
    assert list(found["model"].ppl_by_position) == ["0-8"]
