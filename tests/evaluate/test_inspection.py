"""An inspection says what the model computed: matches, gates, probabilities, health."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.inspection import inspect_text
from rosakit.ops import suffix_match
from rosakit.tuning import RosaConfig, attach, rosa_parameters
from rosakit.tuning.attach import controller_of, record_matches
from tests.tuning import texts
from tests.tuning.tiny import build

TEXT = " ".join(["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 4)


def prepared(**options):
    model = attach(build(depth=2), RosaConfig(**{"window": 6, "sink_tokens": 2, **options}))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_candidates_and_probabilities_are_the_models_own():
    model = prepared(adapters=False, token_route=True, token_candidates=2)
    tokenizer = texts.tokenizer()
    found = inspect_text(model, tokenizer, TEXT)
    assert "".join(found.tokens) == TEXT
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(found.log_prob[1:]), expected, atol=1e-5)
    assert found.log_prob[0] is None
    match = suffix_match(ids[:, None], ids[:, None])
    first, second = found.traces
    assert first.position == match.position[0, 0].tolist()
    assert first.length == match.length[0, 0].tolist()
    assert second.position == [-1] * 36  # after each word comes one other word, always
    assert [w > 0 for w in first.weight] == [p >= 0 for p in first.position]
    assert found.health["token route"]["first_hit_rate"] == 1.0
    # Without the route the same model says less of what repeats.
    controller_of(model)._modules["token_route"] = None
    with torch.no_grad():
        plain = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    base = plain.gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(found.base_log_prob[1:]), base, atol=1e-5)


def test_layers_show_their_routes_and_what_they_agree_on():
    model = prepared(layers=(1,), bits=4)
    tokenizer = texts.tokenizer()
    found = inspect_text(model, tokenizer, TEXT, routes=2)
    assert [t.kind for t in found.traces] == ["layer", "route", "route"]
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    with record_matches(model) as records, torch.no_grad():
        model(input_ids=ids)
    match = records[0].matches[1]
    layer = found.traces[0]
    for t in range(ids.shape[1]):
        here = match.position[0, :, t].tolist()
        assert here.count(layer.position[t]) == max(map(here.count, here))
        assert layer.weight[t] == pytest.approx(here.count(layer.position[t]) / 8, abs=1e-3)
    for trace in found.traces[1:]:
        route = int(trace.name.split()[-1])
        assert trace.position == match.position[0, route].tolist()
    assert {"match_rate", "entropy_worst", "key_token"} <= found.health["layer 1"].keys()
    assert found.base_log_prob == []


def test_recalled_spans_are_shown():
    model = prepared(adapters=False, recall=2, recall_before=1, recall_after=1)
    tokenizer = texts.tokenizer()
    found = inspect_text(model, tokenizer, TEXT)
    assert [(t.name, t.kind) for t in found.traces] == [
        ("recalled span 1", "span"),
        ("recalled span 2", "span"),
    ]
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    match = suffix_match(ids[:, None], ids[:, None])
    assert found.traces[0].position == match.position[0, 0].tolist()
    assert found.health["recalled spans"]["key_token"] == 1.0
    assert found.base_log_prob == []


def test_long_texts_are_cut_and_nothing_to_show_is_said():
    model = prepared(adapters=False, token_route=True)
    assert len(inspect_text(model, texts.tokenizer(), TEXT, max_tokens=7).tokens) == 7
    with pytest.raises(InvalidInputError, match="1 tokens, inspect needs at least 2"):
        inspect_text(model, texts.tokenizer(), "w1")
    bare = attach(build(depth=2), RosaConfig(window=4, adapters=False))
    with pytest.raises(InvalidInputError, match="neither a token route nor recalled spans"):
        inspect_text(bare, texts.tokenizer(), TEXT)
    control = prepared(retrieve=False)
    with pytest.raises(InvalidInputError, match="neither a token route nor recalled spans"):
        inspect_text(control, texts.tokenizer(), TEXT)
