"""Features of a frozen model: exactly the whole model's loss, scores and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rosakit.errors import InvalidInputError
from rosakit.evaluate.routes import route_scorer
from rosakit.evaluate.scores import model_scorer
from rosakit.layers import TokenRoute
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.attach import controller_of
from rosakit.tuning.fit_route import fit_features, fit_token_route
from rosakit.tuning.route_features import (
    FeatureReader,
    concatenate,
    fingerprint,
    label_log_prob,
    label_scores,
    tapped,
)
from tests.tuning.tiny import attached, build, pad_rows, tokens


def packed(length=64, cut=23):
    ids = tokens(1, length, seed=5)
    position = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
    labels = torch.where(position == 0, -100, ids)
    return {"input_ids": ids, "labels": labels, "position_ids": position}


def padded():
    ids, mask = pad_rows([tokens(1, 40, seed=1)[0], tokens(1, 27, seed=2)[0]], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def plain():
    return {"input_ids": tokens(2, 50, seed=3)}


def values(features):
    return list(vars(features).values())


def whole_loss(model, batch):
    """Sum of the losses and their number, from the logits of the whole model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels", batch["input_ids"])[:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("make", [plain, padded, packed])
def test_loss_and_gradients_are_the_whole_models(make, retrieve):
    model = attached(token_route=True, adapters=False, retrieve=retrieve)
    route = controller_of(model).token_route
    batch = make()
    features = FeatureReader(model).read(batch)
    scored = label_log_prob(route, features)
    expected, count = whole_loss(model, batch)
    assert len(features) == count
    torch.testing.assert_close(-scored.sum(), expected, rtol=1e-5, atol=1e-4)
    names, parameters = zip(*route.named_parameters(), strict=True)
    ours = torch.autograd.grad(-scored.sum(), parameters)
    theirs = torch.autograd.grad(expected, parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert b.abs().sum() > 0, f"{name} has no gradient, so nothing was compared"


@pytest.mark.parametrize("retrieve", [True, False])
@pytest.mark.parametrize("keep", [None, 7])
@pytest.mark.parametrize("make", [plain, padded])
def test_scores_are_the_whole_models(make, keep, retrieve):
    model = attached(token_route=True, adapters=False, retrieve=retrieve, noise=0.5)
    batch = make()
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask.bool()
    scorer = route_scorer(model, {"a": controller_of(model).token_route, "base": None})
    found = scorer(batch["input_ids"], mask, keep)
    whole = model_scorer(model)(batch["input_ids"], mask, keep)["model"]
    real = torch.ones_like(whole.greedy)
    if mask is not None:
        real = mask[:, 1:][:, -whole.greedy.shape[1] :]
    torch.testing.assert_close(
        found["a"].log_prob[real], whole.log_prob[real], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(found["a"].greedy[real], whole.greedy[real])
    if keep is None:
        assert 0 < whole.greedy[real].float().mean() < 1
    base = attach(build(), RosaConfig(window=9, sink_tokens=3, adapters=False))
    expected = model_scorer(base)(batch["input_ids"], mask, keep)["model"]
    torch.testing.assert_close(
        found["base"].log_prob[real], expected.log_prob[real], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(found["base"].greedy[real], expected.greedy[real])


def test_greedy_holds_for_every_token_of_the_vocabulary():
    model = attached(token_route=True, adapters=False, noise=1.0)
    route = controller_of(model).token_route
    ids = tokens(1, 40)
    features = FeatureReader(model).read({"input_ids": ids})
    with tapped(model) as calls, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    mixed = route(*calls[0])[0, :-1]
    logits = calls[0].logits[0, :-1]
    log_p = logits - logits.logsumexp(-1, keepdim=True)  # to the last bit as the features have it
    for token in range(mixed.shape[-1]):
        label = torch.full_like(features.label, token)
        asked = replace(features, label=label, label_log_p=log_p[:, token])
        scored, greedy = label_scores(route, asked)
        torch.testing.assert_close(scored, mixed[:, token], rtol=1e-5, atol=1e-5)
        assert torch.equal(greedy, mixed.argmax(-1) == token), token


def repeats(seed, length=96):
    """Random tokens whose second half copies the first: only retrieval can know it."""
    half = torch.randint(3, 61, (length // 2,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": torch.cat([half, half])}


def test_training_finds_what_only_retrieval_knows():
    losses = {}
    for retrieve in (True, False):
        model = attach(
            build(), RosaConfig(window=9, adapters=False, token_route=True, retrieve=retrieve)
        )
        before = {n: p.clone() for n, p in model.named_parameters() if "token_route" not in n}
        fit = fit_token_route(model, [repeats(s) for s in range(4)], steps=60, batch_tokens=256)
        assert fit.tokens == 4 * 95
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
        loss, count = whole_loss(model, {"input_ids": repeats(99)["input_ids"][None]})
        losses[retrieve] = float(loss.detach()) / count
        assert fit.after <= fit.before
    assert losses[True] < losses[False] - 1


def test_training_repeats_itself_and_depends_on_the_seed():
    model = attached(token_route=True, adapters=False)
    features = FeatureReader(model).read(plain())
    state = controller_of(model).token_route.state_dict()

    def trained(seed):
        route = TokenRoute(32)
        route.load_state_dict(state)
        fit_features(route, features, steps=5, batch_tokens=20, seed=seed)
        return torch.cat([p.detach().flatten() for p in route.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_features_are_kept_and_damage_is_noticed(tmp_path):
    model = attached(token_route=True, adapters=False)
    first = FeatureReader(model, tmp_path).read(plain())
    (file,) = tmp_path.iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureReader, "_compute", lambda *_: pytest.fail("computed again"))
        again = FeatureReader(model, tmp_path).read(plain())
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(again), strict=True))
    for damage in (b"", file.read_bytes()[:-50]):
        file.write_bytes(damage)
        repaired = FeatureReader(model, tmp_path).read(plain())
        assert all(torch.equal(a, b) for a, b in zip(values(first), values(repaired), strict=True))
    FeatureReader(model, tmp_path).read(plain(), keep=3)
    assert len(list(tmp_path.iterdir())) == 2


def test_fingerprint_sees_what_matters():
    options = {"token_route": True, "adapters": False, "noise": 0.0}
    reference = fingerprint(attached(**options))
    assert fingerprint(attached(**options)) == reference
    assert fingerprint(attached(**{**options, "noise": 1.0})) == reference  # the route's own
    assert fingerprint(attached(**options, retrieve=False)) == reference
    assert fingerprint(attached(**options, window=8)) != reference
    assert fingerprint(attached(**options, token_candidates=2)) != reference
    changed = attached(**options)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    assert fingerprint(changed) != reference


def test_the_route_is_back_after_an_error():
    model = attached(token_route=True, adapters=False)
    route = controller_of(model).token_route
    with pytest.raises(RuntimeError, match="stop"), tapped(model):
        raise RuntimeError("stop")
    assert controller_of(model).token_route is route


def test_blocks_are_concatenated_in_order():
    reader = FeatureReader(attached(token_route=True, adapters=False))
    parts = [reader.read(plain()), reader.read(packed())]
    both = concatenate(parts)
    assert len(both) == len(parts[0]) + len(parts[1])
    assert torch.equal(both.label[len(parts[0]) :], parts[1].label)


@pytest.mark.parametrize(
    ("options", "blocks", "message"),
    [
        ({"token_route": False}, [{}], "no token route"),
        ({"token_route": True}, [], "at least one block"),
        (
            {"token_route": True},
            [{"input_ids": tokens(1, 9), "labels": torch.full((1, 9), -100)}],
            "no labels",
        ),
    ],
)
def test_bad_input(options, blocks, message):
    with pytest.raises(InvalidInputError, match=message):
        fit_token_route(attached(**options), blocks)


def test_a_bare_model_is_refused():
    with pytest.raises(InvalidInputError, match="not attached"):
        FeatureReader(build())
