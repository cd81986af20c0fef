"""Kinds of addresses in a whole model: streaming, padding, packing, saving, teaching."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers.supervision import AttentionTargets
from rosakit.tuning import (
    RosaConfig,
    TuneConfig,
    adapters_of,
    attach,
    load_adapter,
    load_session,
    record_matches,
    retention,
    save_adapter,
    save_session,
)
from rosakit.tuning.attach import controller_of
from rosakit.tuning.loss import LossModel, find_head
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.stages import parameter_groups
from rosakit.tuning.teaching import AddressTeacher, known_log_probs
from rosakit.tuning.train import tune
from tests.tuning.test_cache import in_chunks
from tests.tuning.texts import corpus, model, tokenizer
from tests.tuning.tiny import attached, build, pad_rows, positions_of, tokens

KINDS = {
    "shared": {"shared_qk": True},
    "grouped": {"value_groups": 2},
    "grouped_shared": {"value_groups": 4, "share_projections": True, "projection_rank": None},
    "grouped_token": {"value_groups": 2, "address": "token", "unmatched": "null"},
    "candidates": {"address": "token", "address_candidates": 2, "length_tiers": (1, 2, 3)},
    "far": {"address": "token", "far_distance": 9, "length_tiers": (1, 2)},
    "hash": {"address": "hash", "bits": 8, "hash_orders": (1, 2, 3)},
    "hash_tiers": {"address": "hash", "bits": 8, "hash_orders": (1, 3), "length_tiers": (1, 2)},
    "hash_16": {"address": "hash", "bits": 16, "hash_orders": (1, 2), "min_length": 2},
    "refined": {"address": "hash", "bits": 8, "hash_refine": True, "hash_scale": 0.8},
    "refined_shared": {"address": "hash", "hash_refine": True, "shared_qk": True, "bits": 4},
    "select": {
        "address": "token",
        "address_candidates": 3,
        "far_distance": 9,
        "select": 6,
        "select_tiers": (0.0, 0.25, 0.5),
    },
    "select_lens": {
        "address": "token",
        "address_candidates": 3,
        "far_distance": 9,
        "select": 6,
        "select_tiers": (0.0, 0.25, 0.5),
        "select_lens": True,
    },
    "lengths": {
        "address": "token",
        "address_candidates": 2,
        "far_distance": 5,
        "far_candidates": 3,
        "length_tiers": (1, 2, 3),
        "select": 6,
        "select_lens": True,
    },
    "lengths_choice": {
        "address": "token",
        "far_distance": 5,
        "far_candidates": 3,
        "length_tiers": (1, 2, 3),
        "select": 6,
        "select_trust": False,
    },
    "far_many": {"address": "token", "far_distance": 5, "far_candidates": 20, "select": 6},
    "far_several": {"address": "token", "far_distance": 5, "far_candidates": 4},
    "with_route": {"address": "token", "far_distance": 5, "token_route": True},
}
COMMON = {"own_value": True, "global_layers": (1,)}


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    monkeypatch.setattr(retention, "RESERVE", 5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_whole_chunked_padded_and_packed_agree(kind):
    model = attached(**COMMON, **KINDS[kind])
    ids = tokens(2, 40, kinds=4)
    whole = model(ids, use_cache=False).logits
    for sizes in ([40], [1] * 40, [7, 1, 1, 20, 1, 10]):
        got, _ = in_chunks(model, ids, sizes)
        torch.testing.assert_close(got, whole, atol=3e-5, rtol=1e-4)

    rows = [tokens(1, n, kinds=4, seed=n)[0] for n in (31, 2, 14)]
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    for side in ("left", "right"):
        padded, mask = pad_rows(rows, side)
        whole = model(
            padded, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        ).logits
        got, _ = in_chunks(model, padded, [12, 1, 1, 17], mask)
        for i, expected in enumerate(alone):
            real = mask[i] != 0
            torch.testing.assert_close(whole[i][real], expected, atol=3e-5, rtol=1e-4)
            torch.testing.assert_close(got[i][real], expected, atol=3e-5, rtol=1e-4)

    position = torch.cat([torch.arange(len(row)) for row in rows])
    packed = model(torch.cat(rows)[None], position_ids=position[None], use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rollback_reorder_and_saved_sessions(kind, tmp_path):
    model = attached(**COMMON, **KINDS[kind])
    ids = tokens(2, 30, kinds=4)
    _, cache = in_chunks(model, ids[:, :20], [13, 7])
    other = copy.deepcopy(cache)
    save_session(tmp_path / "session", model, cache)
    loaded = load_session(tmp_path / "session", model).cache
    expected = model(ids[:, 20:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 20:], past_key_values=loaded).logits, expected)
    other.crop(-3)
    got = model(ids[:, 17:], past_key_values=other).logits[:, 3:]
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)
    _, cache = in_chunks(model, ids[:, :20], [20])
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(ids[:, 20:].flip(0), past_key_values=cache).logits
    torch.testing.assert_close(got, expected.flip(0), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_adapters_load_into_a_fresh_model(kind, tmp_path):
    model = attached(**COMMON, **KINDS[kind])
    save_adapter(model, tmp_path)
    fresh = build()
    load_adapter(fresh, tmp_path)
    ids = tokens(2, 30, kinds=4)
    assert torch.equal(fresh(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_codes_need_token_ids():
    model = attached(address="hash")
    embeds = model.get_input_embeddings()(tokens(1, 12))
    with pytest.raises(InvalidInputError, match="pass input_ids instead"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_far_candidate_is_never_near():
    model = attached(address="token", far_distance=9)
    with record_matches(model) as contexts:
        model(tokens(1, 60, kinds=3), use_cache=False)
    position = contexts[0].matches[0].position[0]
    own = torch.arange(60)
    far = position[1::2]
    assert (far >= 0).any()
    assert ((far < 0) | (own - far >= 9)).all()
    assert ((position[::2] >= 0) & (own - position[::2] < 9)).any()


# Teaching.


def taught(kind, **options):
    model = build()
    head = find_head(model)
    torch.manual_seed(0)
    attach(model, RosaConfig(window=9, sink_tokens=3, layers=(0, 2), **options))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".rosa." in name)
    return model, LossModel(model, head, teacher=AddressTeacher(kind, 16), teacher_weight=1.0)


@pytest.mark.parametrize("kind", ["next_token", "teacher"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 4, "shared_qk": True},
        {"bits": 8, "address": "hash", "hash_refine": True},
    ],
    ids=str,
)
def test_the_address_loss_trains_addresses_and_nothing_else(kind, checkpointing, options):
    model, loss = taught(kind, **options)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 60, kinds=4)
    torch.manual_seed(3)
    loss.observe = True
    loss(input_ids=ids, labels=ids)["loss"].backward()
    # Before the first step outputs are zero, so nothing but the address loss reaches q and k.
    for adapter in adapters_of(model).values():
        for projection in (adapter.q_proj, adapter.k_proj):
            if projection is not None:
                assert any(p.grad is not None and p.grad.any() for p in projection.parameters())
        assert not any(p.grad is not None and p.grad.any() for p in adapter.v_proj.parameters())
    assert loss.health["address_loss"] > 0
    assert controller_of(model).teacher is None


def test_the_address_loss_falls_when_trained():
    model, loss = taught("next_token", bits=4, shared_qk=True)
    ids = torch.arange(5, 65).view(1, -1).repeat(2, 1) % 11 + 3  # the token decides the next one
    config = TuneConfig(rosa=controller_of(model).config, lr=3e-2, qk_lr_scale=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    loss.observe = True
    torch.manual_seed(0)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        loss(input_ids=ids, labels=ids)["loss"].backward()
        optimizer.step()
        seen.append(loss.health["address_loss"])
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


@torch.no_grad()
@pytest.mark.parametrize("linear", [True, False])
def test_the_surplus_is_counted_from_the_windowed_model_without_adapters(linear):
    plain = build()
    attach(plain, RosaConfig(window=9, sink_tokens=3, adapters=False))
    ids = tokens(2, 50, kinds=6)
    expected = plain(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
    model = attached(**COMMON | {"global_layers": ()}, **KINDS["with_route"])
    before = model(ids, use_cache=False).logits
    got = known_log_probs(model, {"input_ids": ids, "use_cache": False}, linear=linear)
    torch.testing.assert_close(got[:, :-1], expected)
    assert torch.equal(model(ids, use_cache=False).logits, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_surplus_teaches_the_choice_and_nothing_else(checkpointing):
    model, loss = taught("surplus", **KINDS["lengths"])
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 60, kinds=4)
    loss.observe = True
    loss(input_ids=ids, labels=ids)["loss"].backward()
    for adapter in adapters_of(model).values():
        reached = {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
        assert {"selection.query.weight", "selection.null_score"} <= reached
        assert not any(name.startswith("projections.w_v") for name in reached)
    # The mixture of what is read and what the untrained model knows.
    assert loss.health["address_loss"] == pytest.approx(surplus_of(model, ids), rel=1e-4)


@torch.no_grad()
def surplus_of(model, ids):
    """The loss at the start by its definition, from exact matches alone."""
    known = known_log_probs(model, {"input_ids": ids, "use_cache": False}, linear=True).exp()
    with record_matches(model) as contexts:
        model(ids, use_cache=False)
    found, losses = contexts[-1].token_match, []
    for part, ranks in ((slice(0, 2), [0, 1]), (slice(2, 5), [0, 1, 2])):
        nats = []
        for b in range(ids.shape[0]):
            for i in range(ids.shape[1] - 1):
                position = found.position[b, part, i].tolist()
                length = found.length[b, part, i].tolist()
                if max(position) < 0:
                    continue
                weights = [  # lengths are compared in octaves, as nats
                    math.exp(math.log2(n) - 0.2 * rank) if p >= 0 else 0.0
                    for rank, n, p in zip(ranks, [max(n, 1) for n in length], position, strict=True)
                ]
                right = sum(
                    w for w, p in zip(weights, position, strict=True) if ids[b, p] == ids[b, i + 1]
                )
                nothing = math.exp(3.0)
                share = (right + nothing * float(known[b, i])) / (sum(weights) + nothing)
                nats.append(-math.log(share))
        losses.append(sum(nats) / len(nats))
    return sum(losses) / 2


@torch.no_grad()
def test_the_teacher_is_the_plain_model_with_full_attention():
    """Its hidden states are those of the model before it was attached; adapters are silent."""
    plain = build()
    ids = tokens(2, 50, kinds=6)
    expected = decoder_of(plain)(input_ids=ids, use_cache=False)[0]
    model = attached(own_value=True)
    controller = controller_of(model)
    assert not torch.allclose(decoder_of(model)(input_ids=ids, use_cache=False)[0], expected)
    controller.teacher = AttentionTargets(torch.full((2, 1), 49), 9, 3)
    got = decoder_of(model)(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(got, expected)
    assert sorted(controller.teacher.layers) == [0, 1, 2]
    controller.teacher = None
    eager = build(attn_implementation="eager")
    shares = eager(ids, output_attentions=True, use_cache=False).attentions
    teacher = AttentionTargets(torch.full((2, 1), 49), 9, 3)
    controller.teacher = teacher
    decoder_of(model)(input_ids=ids, use_cache=False)
    controller.teacher = None
    for index, share in enumerate(shares):
        beyond = share[:, :, 49, 3:41]
        torch.testing.assert_close(teacher.layers[index].weight[..., 0], beyond.sum(-1))
        assert torch.equal(teacher.layers[index].keys[..., 0], beyond.argmax(-1) + 2)


@pytest.mark.parametrize(
    "rosa, message",
    [
        ({"adapters": False, "token_route": True}, "teaches learned addresses"),
        ({"adapters": True, "address": "token"}, "teaches learned addresses"),
        ({"adapters": True, "window": None}, "beyond the window"),
    ],
)
def test_address_losses_that_teach_nobody_are_refused(rosa, message):
    with pytest.raises(InvalidInputError, match=message):
        TuneConfig(rosa=RosaConfig(**rosa), address_loss="teacher")


def test_losses_and_options_of_a_choice_need_one():
    with pytest.raises(InvalidInputError, match="set select"):
        TuneConfig(rosa=RosaConfig(), address_loss="surplus")
    chosen = RosaConfig(address="token", select=4)
    with pytest.raises(InvalidInputError, match="'next_token' or 'surplus'"):
        TuneConfig(rosa=chosen, address_loss="teacher")
    assert TuneConfig(rosa=chosen, address_loss="surplus").address_loss == "surplus"
    with pytest.raises(InvalidInputError, match="select_credit=False leaves"):
        TuneConfig(rosa=RosaConfig(address="token", select=4, select_credit=False))
    with pytest.raises(InvalidInputError, match="'surplus' or 'teacher'"):
        AddressTeacher("next", 4)
    with pytest.raises(InvalidInputError, match="set far_distance"):
        RosaConfig(address="token", far_candidates=2)


# Health while tuning.


def tune_run(output, rosa, **options):
    config = TuneConfig(
        output=output,
        rosa=rosa,
        length=96,
        steps=4,
        batch_size=2,
        log_every=2,
        save_every=0,
        eval_blocks=2,
        device="cpu",
        **options,
    )
    return tune(config, model=model(), tokenizer=tokenizer(), documents=corpus(), show=False)


SMALL = {"window": 16, "sink_tokens": 2, "layers": (0, 1), "token_route": False}


def logged(result, name):
    return [entry[name] for entry in result.metrics["history"] if name in entry]


def test_tune_warns_of_drifting_addresses_and_logs_them(tmp_path):
    ill = RosaConfig(tied_start=False, bits=4, **SMALL)
    with pytest.warns(RuntimeWarning, match="layer 0 .*share one projection") as seen:
        result = tune_run(tmp_path / "ill", ill)
    drifting = [w for w in seen if "agree in" in str(w.message)]
    assert len(drifting) == 1  # not at every step, nor for every layer
    assert logged(result, "fault_drifting") == [1.0, 1.0]
    assert logged(result, "faults") == [1.0, 1.0]
    assert max(logged(result, "qk_agreement")) < 0.6
    assert result.metrics["health"]["fault_drifting"] == 1.0


def test_tune_is_silent_about_healthy_addresses(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rosakit: layer")
        result = tune_run(tmp_path / "well", RosaConfig(bits=2, shared_qk=True, **SMALL))
    assert logged(result, "faults") == [0.0, 0.0]
    assert logged(result, "qk_agreement") == [1.0, 1.0]
    assert all(1.9 < value < 2.1 for value in logged(result, "levels"))


def test_tune_teaches_addresses(tmp_path):
    rosa = RosaConfig(address="hash", hash_refine=True, shared_qk=True, bits=8, **SMALL)
    options = {"address_loss": "next_token", "address_samples": 24, "qk_lr_scale": 1.0}
    result = tune_run(tmp_path / "taught", rosa, **options)
    assert len(logged(result, "address_loss")) == 2
    plain = tune_run(tmp_path / "plain", rosa, qk_lr_scale=1.0)
    assert not logged(plain, "address_loss")
    q = {i: a.q_proj for i, a in adapters_of(result.model).items()}
    other = {i: a.q_proj for i, a in adapters_of(plain.model).items()}
    assert all(
        not torch.equal(a, b)
        for i in q
        for a, b in zip(q[i].parameters(), other[i].parameters(), strict=True)
    )
    control = tune_run(tmp_path / "control", rosa, control=True, **options)
    assert not logged(control, "address_loss")
