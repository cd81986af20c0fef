"""`backend="pipeline"` in a model: matching begun before the attention, read behind it."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit import native, pipeline
from rosakit.errors import InvalidInputError
from rosakit.tuning import RosaConfig, rosa_parameters
from tests.tuning.tiny import attached, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled core is missing")


def graded(model, ids, **inputs):
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in rosa_parameters(model).values())]


def compare(mine, right):
    for a, b in zip(mine, right, strict=True):
        # The order in which autograd adds gradients of shared inputs differs.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_same_loss_and_gradients(family):
    ids = tokens(2, 40)
    mine, right = (graded(attached(family, backend=b), ids) for b in ("pipeline", "auto"))
    compare(mine, right)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    """The recomputation begins and reads its own matches."""
    ids = tokens(2, 40)
    results = []
    for backend in ("pipeline", "auto"):
        model = attached(backend=backend).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        results.append(graded(model, ids))
    compare(*results)


def test_the_match_begins_before_the_attention_and_is_read_behind_it(monkeypatch):
    order = []
    model = attached(backend="pipeline")
    attention = model.model.layers[0].self_attn

    def submit(self, *args, real=pipeline.Pipeline.submit, **kwargs):
        order.append("begin")
        return real(self, *args, **kwargs)

    def result(self, real=pipeline.Ticket.result):
        order.append("read")
        return real(self)

    monkeypatch.setattr(pipeline.Pipeline, "submit", submit)
    monkeypatch.setattr(pipeline.Ticket, "result", result)
    plain = attention.o_proj.forward
    monkeypatch.setattr(
        attention.o_proj, "forward", lambda x: (order.append("attend"), plain(x))[1]
    )
    model(tokens(1, 20), use_cache=False)
    assert order[:3] == ["begin", "attend", "read"]
    assert order.count("begin") == order.count("read") == 3


def test_decoding_and_pre_attention_give_the_same_numbers():
    ids = tokens(1, 24)
    for options in ({}, {"inject": "pre_attn"}):
        mine, right = (
            attached(backend=b, **options).generate(ids, max_new_tokens=6, do_sample=False)
            for b in ("pipeline", "auto")
        )
        assert torch.equal(mine, right)


def test_a_copied_model_has_its_own_hooks():
    ids = tokens(1, 30)
    model = attached(backend="pipeline")
    compare(graded(copy.deepcopy(model), ids), graded(model, ids))


def test_other_estimators_are_refused():
    with pytest.raises(InvalidInputError, match="counterfactual"):
        RosaConfig(backend="pipeline", estimator="bitflip")
