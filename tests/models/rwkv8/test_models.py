"""Every family: the recurrent mode is the parallel one, gradients arrive, misuse is named."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.models import rwkv8
from rosakit.models.rwkv8 import state as state_module
from rosakit.ops import estimators
from tests.models.rwkv8.small import MODELS, random_model, tokens_for

EVERY = pytest.mark.parametrize("name", sorted(MODELS))


@EVERY
@pytest.mark.parametrize("chunks", [(1,) * 30, (13, 1, 16), (30,)], ids=["ones", "mixed", "whole"])
@torch.no_grad()
def test_recurrent_equals_parallel(name, chunks):
    model = random_model(name).double()
    tokens = tokens_for(model, 3, 30)
    whole = model(tokens)
    state = model.init_state(3)
    parts = [model.step(part, state) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["counting4", "hybrid", "lm4"])
def test_without_the_core_steps_are_the_same(name, monkeypatch):
    model = random_model(name).double()
    tokens = tokens_for(model, 2, 24)
    whole = model(tokens)
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(state_module, "warn_once", lambda message: None)
    monkeypatch.setattr("rosakit.ops.match.warn_once", lambda message: None)
    state = model.init_state(2)
    steps = torch.stack([model.step(token, state) for token in tokens.unbind(1)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["counting1", "hybrid", "lm4"])
@torch.no_grad()
def test_state_forks_and_selects(name):
    model = random_model(name).double()
    tokens = tokens_for(model, 3, 20)
    state = model.init_state(3)
    model.step(tokens[:, :12], state)
    twin = state.fork()
    model.step(tokens[:, :5], twin)  # what the copy sees does not reach the original
    order = [2, 0, 0]
    state.select(order)
    got = model.step(tokens[order, 12:], state)
    torch.testing.assert_close(got, model(tokens[order])[:, 12:], rtol=1e-9, atol=1e-9)


@EVERY
def test_every_parameter_gets_a_gradient(name):
    model = random_model(name)
    tokens = tokens_for(model, 4, 40)
    logits = model(tokens[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    # Layer 0 gives its values to the later layers; its own residual maps are published but idle.
    idle = {f"rwkv1.v{i}" for i in range(3)}
    dead = {
        n
        for n, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().sum() or not p.grad.isfinite().all()
    }
    assert dead <= idle


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("name", ["counting1", "hybrid"])
def test_every_estimator_trains(name, estimator):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    model.use_estimator(estimator)
    tokens = tokens_for(model, 4, 24)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_no_graph_breaks():
    model = random_model("hybrid")
    tokens = tokens_for(model, 2, 10)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_unknown_estimator():
    with pytest.raises(InvalidInputError, match="known are"):
        random_model("lm1").use_estimator("straight_through")
    with pytest.raises(InvalidInputError, match="does not take colour"):
        random_model("lm1").use_estimator("counterfactual", {"colour": 1})


@torch.no_grad()
def test_large_vocabularies_of_the_token_memory():
    """Past 256 tokens the streams are token ids, not symbols of 8 bits."""
    torch.manual_seed(0)
    model = rwkv8.CountingModel(rwkv8.CountingConfig(vocabulary=300, channels=8, layers=0))
    tokens = torch.tensor([[7, 263, 7, 263, 7]])  # 263 = 7 modulo 256
    predicted = model.emb_rosa(tokens)
    assert torch.equal(predicted[0, 2:], model.emb_rosa.emb.weight[[263, 7, 263]])
    assert not predicted[0, :2].any()
    state = model.init_state(1)
    steps = [model.step(token, state) for token in tokens.unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), model(tokens))


@torch.no_grad()
def test_rows_do_not_mix():
    model = random_model("hybrid").double()
    tokens = tokens_for(model, 3, 25)
    torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]), rtol=1e-9, atol=1e-9)


def test_wrong_tokens():
    model = random_model("alone")
    with pytest.raises(InvalidInputError, match="token 11 is outside"):
        model(torch.tensor([[0, 11]]))
    with pytest.raises(InvalidInputError, match=r"shape \[B, T\]"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(InvalidTypeError, match="must be integers"):
        model(torch.zeros(1, 3))


def test_wrong_states():
    model = random_model("alone")
    with pytest.raises(InvalidInputError, match="at least one row"):
        model.init_state(0)
    state = model.init_state(2)
    with pytest.raises(InvalidInputError, match="holds 2 rows but tokens have 3"):
        model.step(torch.zeros(3, dtype=torch.int64), state)
    with pytest.raises(InvalidInputError, match=r"in 0\.\.1"):
        state.select([2])


def test_wrong_sizes():
    with pytest.raises(InvalidInputError, match="1 or 4 bits"):
        rwkv8.RosaStreamLayer(8, 2)
    with pytest.raises(InvalidInputError, match="do not divide into routes"):
        rwkv8.RosaBlock(6, 4)
    with pytest.raises(InvalidInputError, match="heads of 16"):
        rwkv8.TimeMix(24)
