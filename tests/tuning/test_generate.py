"""generate() on attached models: every strategy computes what the whole sequence computes."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.retention import RESERVE
from tests.tuning.tiny import FAMILIES, attached, build, pad_rows, tokens

OPTIONS = {"token_route": True, "own_value": True, "global_layers": (1,)}
NEW = {"max_new_tokens": 20, "eos_token_id": None}


def greedy_by_hand(model, ids, steps):
    """Greedy decoding with a whole-sequence pass a step."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("address", ["learned", "token"])
@torch.no_grad()
def test_greedy_equals_whole_sequence_passes(family, address):
    model = attached(family, address=address, **OPTIONS)
    ids = tokens(2, 14)
    wanted = greedy_by_hand(model, ids, 20)
    assert torch.equal(model.generate(ids, do_sample=False, **NEW), wanted)
    uncached = model.generate(ids, do_sample=False, use_cache=False, **NEW)
    assert torch.equal(uncached, wanted)


@torch.no_grad()
def test_left_padded_batch_equals_rows_alone():
    model = attached(**OPTIONS)
    rows = [tokens(1, n, seed=n)[0] for n in (17, 1, 9)]
    ids, mask = pad_rows(rows, "left")
    got = model.generate(ids, attention_mask=mask, do_sample=False, **NEW)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], do_sample=False, **NEW)
        assert torch.equal(got[i, 17:], alone[0, len(row) :])


@torch.no_grad()
def test_sampling_is_reproducible_and_uses_the_mixed_distribution():
    model = attached(**OPTIONS)
    ids = tokens(2, 14)
    found = []
    for cached in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(ids, do_sample=True, use_cache=cached, **NEW))
    assert torch.equal(*found)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_beam_search_with_and_without_cache(padded):
    model = attached(**OPTIONS)
    ids, mask = pad_rows([tokens(1, 13)[0], tokens(1, 6 if padded else 13, seed=4)[0]], "left")
    found = [
        model.generate(
            ids, attention_mask=mask, num_beams=3, do_sample=False, use_cache=cached, **NEW
        )
        for cached in (True, False)
    ]
    assert torch.equal(*found)


@torch.no_grad()
def test_prompt_lookup_equals_greedy():
    model = attached(**OPTIONS)
    ids = tokens(1, 24, kinds=3)
    wanted = model.generate(ids, do_sample=False, **NEW)
    got = model.generate(ids, do_sample=False, prompt_lookup_num_tokens=4, **NEW)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_assisted_generation_equals_greedy():
    model, assistant = attached(**OPTIONS), attached(noise=0.2, **OPTIONS)
    ids = tokens(1, 24, kinds=3)
    wanted = model.generate(ids, do_sample=False, **NEW)
    got = model.generate(ids, do_sample=False, assistant_model=assistant, **NEW)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_chunked_prefill_and_a_second_turn():
    model = attached(**OPTIONS)
    ids = tokens(1, 30)
    wanted = model.generate(ids, do_sample=False, **NEW)
    got = model.generate(ids, do_sample=False, prefill_chunk_size=7, **NEW)
    assert torch.equal(got, wanted)

    first = model.generate(ids, do_sample=False, return_dict_in_generate=True, **NEW)
    longer = torch.cat([first.sequences, tokens(1, 5, seed=8)], 1)
    again = model.generate(longer, past_key_values=first.past_key_values, do_sample=False, **NEW)
    assert torch.equal(again, model.generate(longer, do_sample=False, **NEW))


@torch.no_grad()
def test_memory_stays_bounded_over_a_long_generation():
    model = attached(global_layers=())
    out = model.generate(
        tokens(1, 10),
        do_sample=False,
        max_new_tokens=80,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers[:3]} == {12 + RESERVE}


@torch.no_grad()
def test_a_static_cache_is_refused():
    model = attached(**OPTIONS)
    with pytest.raises(InvalidInputError, match=r"static, quantized and other caches are refused"):
        model.generate(tokens(1, 8), cache_implementation="static", **NEW)


@torch.no_grad()
def test_embeddings_alone_are_refused_where_ids_are_needed():
    embeds = attached().get_input_embeddings()(tokens(1, 8))
    attached()(inputs_embeds=embeds)
    for options in ({"token_route": True}, {"address": "token"}):
        with pytest.raises(InvalidInputError, match="pass input_ids instead"):
            attached(**options)(inputs_embeds=embeds)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_forward_generates_alike():
    """Caches and memories are graph breaks; what lies between them is compiled."""
    model = attach(build(depth=1), RosaConfig(window=9, token_route=True))
    few = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    wanted = model.generate(tokens(1, 20), **few)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(tokens(1, 20), **few), wanted)


@torch.no_grad()
def test_contrastive_search_is_refused():
    """transformers moved it to a repository of code that it would have to trust."""
    with pytest.raises(ValueError, match="Contrastive Search requires"):
        attached().generate(tokens(1, 20), penalty_alpha=0.6, top_k=4, **NEW)
