"""The forms of windowed attention give the same numbers, with soft-capping and sink logits too."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.tuning import RosaConfig, attach, detach
from rosakit.tuning.attention_forms import Scores, block_mask, dense, flexible
from rosakit.tuning.window import positions, visible
from tests.tuning.architectures import build_architecture
from tests.tuning.test_window import by_hand, starts_of
from tests.tuning.tiny import build, tokens


def loaded_with(implementation):
    model = build()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("length", [13, 150])
@torch.no_grad()
def test_forms_agree_with_sdpa(implementation, length):
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    found = []
    for name in ("sdpa", implementation):
        model = attach(loaded_with(name), RosaConfig(window=7, sink_tokens=2, global_layers=(1,)))
        plain = model(ids, use_cache=False).logits
        padded = model(ids, attention_mask=mask, use_cache=False).logits[mask != 0]
        out = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=out.past_key_values).logits
        found.append((plain, padded, rest))
        detach(model)
        assert model.config._attn_implementation == name
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)


def changed_scores(layer, scores, mask):
    """What gemma 2 and gpt-oss do to their scores, written out."""
    cap = getattr(layer, "attn_logit_softcapping", None)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask, float("-inf"))
    sinks = getattr(layer, "sinks", None)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("length", [9, 40])
@torch.no_grad()
def test_models_that_change_their_scores(name, length):
    model, ids = build_architecture(name), tokens(2, length)
    window, sinks, native = 6, 2, model.config.sliding_window
    seen = {
        kind: by_hand(length, reach, kept)
        for kind, reach, kept in (
            ("sliding_attention", min(native, window), sinks if native > window else 0),
            ("full_attention", window, sinks),
        )
    }

    def reference(module, query, key, value, attention_mask, **kwargs):
        mask = seen[module.config.layer_types[module.layer_idx]]
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        weight = changed_scores(module, query @ key.mT * kwargs["scaling"], mask)
        return (weight @ value).transpose(1, 2), None

    AttentionInterface.register("reference", reference)
    own = model.config._attn_implementation
    model.config._attn_implementation = "reference"
    wanted = model(ids, use_cache=False).logits
    model.config._attn_implementation = own
    attach(model, RosaConfig(window=window, sink_tokens=sinks, adapters=False))
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_wide_window_leaves_such_models_as_they_are(name):
    model, ids = build_architecture(name), tokens(2, 40)
    wanted = model(ids, use_cache=False).logits
    attach(model, RosaConfig(window=64))
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@torch.no_grad()
def test_flex_is_the_rule(kind, softcap):
    batch, length, window, sinks = 3, 70, 9, 2
    where = positions(length, starts_of(kind, batch, length), torch.device("cpu"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, 16) for heads in (4, 2, 2))
    scores = Scores(scaling=0.3, softcap=softcap)
    mask = visible(where, where, window, sinks)[:, None]
    wanted = dense(torch.nn.Module(), q, k, v, mask, scores, "eager")
    got = flexible(q, k, v, block_mask(where, where, window, sinks), scores)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_what_a_form_cannot_do_is_named():
    model = build()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='flash_attention_2'"):
        attach(model, RosaConfig())
    oss = build_architecture("gpt_oss")
    oss.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="learned sink logits"):
        attach(oss, RosaConfig())
    model = attach(loaded_with("flex_attention"), RosaConfig(window=5)).train()
    with pytest.raises(InvalidInputError, match="no backward pass on a CPU"):
        model(tokens(1, 140), use_cache=False)
