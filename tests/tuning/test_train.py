"""Training attached models: gradients reach everything, whatever recomputes them."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit.tuning import RosaConfig, attach, freeze_base, rosa_parameters
from tests.tuning.tiny import FAMILIES, attached, build, pad_rows, positions_of, tokens

OPTIONS = {"window": 6, "sink_tokens": 2, "token_route": True, "own_value": True}


def gradients(model, ids, **inputs):
    model.zero_grad()
    model(ids, labels=ids, **inputs).loss.backward()
    return {n: p.grad.clone() for n, p in rosa_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inject", ["post_attn", "pre_attn"])
@pytest.mark.parametrize("address", ["learned", "token"])
def test_every_parameter_learns_within_two_steps(family, inject, address):
    model = attach(build(family), RosaConfig(inject=inject, address=address, **OPTIONS)).train()
    freeze_base(model)
    ids = tokens(2, 40, kinds=4)
    optimizer = torch.optim.SGD(rosa_parameters(model).values(), lr=0.5)
    before = model(ids, labels=ids).loss
    reached = set()
    for _ in range(6):
        found = gradients(model, ids)
        reached |= {name for name, grad in found.items() if bool((grad != 0).any())}
        optimizer.step()
    assert reached == set(rosa_parameters(model))
    assert model(ids, labels=ids).loss < before
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("inject", ["post_attn", "pre_attn"])
@pytest.mark.parametrize("address", ["learned", "token"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(inject, address, reentrant):
    model = attached(inject=inject, address=address, **OPTIONS).train()
    freeze_base(model)
    # The second pass of two documents recomputes after the first: each with its own context.
    first, second = tokens(2, 40), tokens(2, 31, seed=5)
    second_positions = torch.cat([torch.arange(11), torch.arange(20)])[None]

    def both():
        model.zero_grad()
        one = model(first, labels=first).loss
        other = model(second, labels=second, position_ids=second_positions).loss
        (one + 2 * other).backward()
        return {n: p.grad.clone() for n, p in rosa_parameters(model).items()}

    wanted = both()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = both()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["left", "right", "packed"])
def test_gradients_of_a_batch_are_those_of_its_rows(form):
    """Sums of losses, so that rows weigh by their tokens."""
    model = attached(**OPTIONS).train()
    rows = [tokens(1, n, seed=n)[0] for n in (33, 12, 20)]

    def summed(ids, labels, **inputs):
        logits = model(ids, use_cache=False, **inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        loss.backward()

    model.zero_grad()
    for row in rows:
        summed(row[None], row[None])
    wanted = {n: p.grad.clone() for n, p in rosa_parameters(model).items()}
    model.zero_grad()
    if form == "packed":
        ids = torch.cat(rows)[None]
        starts = torch.cat([torch.arange(len(row)) for row in rows])[None]
        summed(ids, ids.masked_fill(starts == 0, -100), position_ids=starts)
    else:
        ids, mask = pad_rows(rows, form)
        labels = ids.masked_fill(mask == 0, -100)
        if form == "left":  # the first real token of a row is nobody's target
            labels[torch.arange(3), mask.argmax(1)] = -100
        summed(ids, labels, attention_mask=mask, position_ids=positions_of(mask))
    for name, parameter in rosa_parameters(model).items():
        torch.testing.assert_close(
            parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_training_and_evaluation_compute_the_same_logits():
    model, ids = attached(**OPTIONS), tokens(2, 40)
    with torch.no_grad():
        cached, whole = model(ids).logits, model(ids, use_cache=False).logits
    model.train()
    trained = model(ids).logits
    torch.testing.assert_close(trained, whole)
    torch.testing.assert_close(trained, cached, atol=3e-5, rtol=1e-4)


def test_training_makes_no_cache():
    model, ids = attached(**OPTIONS).train(), tokens(1, 12)
    assert model(ids).past_key_values is None
    model.eval()
    assert model(ids).past_key_values is None  # gradients are on: whole sequences, no cache
    with torch.no_grad():
        assert model(ids).past_key_values is not None
    assert model(ids, use_cache=True).past_key_values is not None


def test_the_base_trains_as_well_when_it_is_left_trainable():
    model, ids = attached(**OPTIONS).train(), tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "rosa" not in name:
            assert parameter.grad is not None, name


def test_autocast():
    model, ids = attached(**OPTIONS).train(), tokens(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in rosa_parameters(model).values())


def test_a_step_of_the_copy_leaves_the_original_alone():
    model, ids = attached(**OPTIONS), tokens(1, 20)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    twin(ids, labels=ids).loss.backward()
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert all(p.grad is None for p in model.parameters())
