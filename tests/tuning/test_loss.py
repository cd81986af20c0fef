"""The chunked loss equals the whole model's loss, and does no more work than it must."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from rosakit.tuning import RosaConfig, attach, record_matches
from rosakit.tuning.attach import controller_of
from rosakit.tuning.lora import add_lora, lora_parameters
from rosakit.tuning.loss import Head, LossModel, find_head, log_probs_of
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.result import set_trainable
from tests.tuning.tiny import build, tokens


def prepared(*, lora=0, family="llama", **options):
    model = build(family, depth=2)
    head = find_head(model)
    if lora:
        add_lora(model, lora)
    attach(model, RosaConfig(window=8, sink_tokens=2, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rosa" in name or "lora" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    set_trainable(model)
    return model, head


def batch():
    ids = tokens(2, 40, kinds=5)
    position = torch.cat([torch.arange(17), torch.arange(23)]).expand(2, -1)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(position == 0, -100),
        "position_ids": position,
    }


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [
        {"adapters": False, "token_route": True},
        {"adapters": True, "own_value": True, "token_route": True},
        {"adapters": True, "token_route": False},
        {"adapters": True, "retrieve": False, "token_route": True},
        {"adapters": False, "token_route": True, "lora": 2},
    ],
)
def test_equals_the_loss_of_the_whole_forward_pass(options, family):
    model, head = prepared(family=family, **options)
    assert head is not None
    loss = LossModel(model, head)(**batch())["loss"]
    loss.backward()
    fast = gradients(model)
    whole = LossModel(model, None)(**batch())["loss"]
    whole.backward()
    plain = gradients(model)
    torch.testing.assert_close(loss, whole)
    assert fast.keys() == plain.keys()
    assert fast
    for name, grad in fast.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_the_same_in_chunks():
    torch.manual_seed(0)
    head = Head(torch.randn(31, 8), torch.randn(31))
    ids = torch.randint(31, (13, 3))
    found = []
    for chunk in (13, 4, 1):
        hidden = torch.randn(13, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = log_probs_of(hidden, ids, head, chunk=chunk)
        (out * torch.arange(39).view(13, 3)).sum().backward()
        found.append((out.detach(), hidden.grad))
    expected = F.log_softmax(F.linear(hidden, *head), -1).gather(-1, ids)
    torch.testing.assert_close(found[0][0], expected.detach())
    for out, grad in found[1:]:
        torch.testing.assert_close(out, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


def test_a_model_that_changes_its_logits_has_no_plain_head():
    model = build()
    assert find_head(model) is not None
    model.lm_head.register_forward_hook(lambda module, args, output: 30 * torch.tanh(output / 30))
    assert find_head(model) is None


def test_nothing_below_the_lowest_trained_part_is_differentiated():
    model, head = prepared(adapters=False, token_route=True)
    seen = {}
    decoder_of(model).register_forward_hook(
        lambda module, args, output: seen.update(hidden=output[0].requires_grad)
    )
    LossModel(model, head)(**batch())["loss"].backward()
    assert seen == {"hidden": False}

    model, head = prepared(adapters=True, layers=(1,), token_route=False)
    for index, layer in enumerate(decoder_of(model).layers):
        layer.register_forward_hook(
            lambda module, args, output, index=index: seen.update({index: output.requires_grad})
        )
    LossModel(model, head)(**batch())["loss"].backward()
    assert (seen[0], seen[1]) == (False, True)


def test_accumulated_loss_is_that_of_the_whole_batch():
    model, head = prepared(adapters=False, token_route=True)
    loss = LossModel(model, head)
    whole = batch()
    total = loss(**whole)
    parts = [
        loss(**{n: v[i : i + 1] for n, v in whole.items()}, num_items=total["tokens"])["loss"]
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), total["loss"])


def test_health_is_measured_when_asked_and_leaves_nothing_behind():
    model, head = prepared(adapters=True, token_route=True)
    loss = LossModel(model, head)
    loss(**batch())
    assert loss.health == {}
    loss.observe = True
    loss(**batch())
    assert set(loss.health) == {
        *("match_rate", "null_rate", "match_length", "key_token", "next_token", "beyond_window"),
        *("flip_change", "entropy", "entropy_worst", "levels", "qk_agreement", "faults"),
        *("candidate_rate", "hit_rate", "first_hit_rate", "gate"),
        *("route_match_length", "route_null_rate", "route_beyond_window"),
    }
    assert controller_of(model).recorder is None
    adapter = model.model.layers[0].rosa.adapter
    assert not adapter.q_proj._forward_hooks
    assert 0 < loss.health["entropy_worst"] <= loss.health["entropy"] <= 4


def test_lora_is_float32_and_starts_silent():
    model = build().to(torch.bfloat16)
    ids = tokens(1, 20)
    before = model(ids).logits
    add_lora(model, 3)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert not any("lm_head" in name for name in lora_parameters(model))
    assert torch.equal(model(ids).logits, before)


def test_matches_are_kept_for_a_few_layers_of_observed_steps_only(monkeypatch):
    """All layers' matches together would be the largest tensors of a training step."""
    from rosakit.tuning import loss as module

    ids = tokens(1, 30)
    model = attach(build(depth=7), RosaConfig(window=9, sink_tokens=3))
    wrapped = LossModel(model, None)
    kept = []
    leave = module._Watch.__exit__

    def spy(self, *error):
        kept.append(sorted(self.context.matches))
        leave(self, *error)

    monkeypatch.setattr(module._Watch, "__exit__", spy)
    wrapped(ids, ids)
    wrapped.observe = True
    wrapped(ids, ids)
    assert kept == [[], [0, 2, 4, 6]]
    assert wrapped.health["match_rate"] > 0
    with record_matches(model) as contexts:
        model(ids)
    assert sorted(contexts[0].matches) == list(range(7))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_that_says_whether_it_is_packed_breaks_no_graph(packed):
    """Position ids need no look: one graph, with the loss and gradients of the plain model."""
    model, _ = prepared(adapters=True, token_route=False)
    inputs = batch()
    if not packed:
        inputs["position_ids"] = torch.arange(40).expand(2, -1)
    loss_model = LossModel(model, None)
    wanted_loss = loss_model(**inputs)["loss"]
    wanted_loss.backward()
    wanted = gradients(model)
    torch._dynamo.reset()
    # The labels that count are picked out, however many there are.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss_model, backend="eager", fullgraph=True)
        loss = compiled(**inputs, packed=packed)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(gradients(model), wanted)
    assert controller_of(model).packed is None


def test_with_a_chunked_loss_only_the_choice_of_labels_breaks_the_graph():
    model, head = prepared(adapters=True, token_route=False)
    torch._dynamo.reset()
    found = torch._dynamo.explain(LossModel(model, head))(**batch(), packed=True)
    places = {r.user_stack[-1].filename.rsplit("/", 1)[-1] for r in found.break_reasons}
    assert places == {"loss.py"}


def test_a_compiled_model_observes_without_compiling_more():
    model, head = prepared(adapters=True, token_route=True)
    loss_model = LossModel(model, head)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loss_model, backend=counter)
    plain = [compiled(**batch(), packed=True)["loss"] for _ in range(2)]
    frames = counter.frame_count
    assert frames > 0
    loss_model.observe = True
    observed = compiled(**batch(), packed=True)["loss"]
    assert loss_model.health["match_rate"] > 0
    assert counter.frame_count == frames
    loss_model.observe = False
    plain.append(compiled(**batch(), packed=True)["loss"])
    assert counter.frame_count == frames
    for loss in plain:
        torch.testing.assert_close(loss, observed)
