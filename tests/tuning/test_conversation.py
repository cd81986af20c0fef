"""Turns: each reads only what is new, saved ones go on, templates keep their text."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.conversation import Conversation, Sampling
from tests.tuning.texts import model, passage, tokenizer

TEMPLATE = (
    "{% for m in messages %}w1 {{ m.role == 'user' and 'w2' or 'w3' }} {{ m.content }} "
    "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w1 w3 {% endif %}"
)
GREEDY = Sampling(max_new_tokens=9, temperature=0)


def attached_model():
    return attach(model(), RosaConfig(window=8, sink_tokens=2, token_route=True))


def chat_tokenizer(template=TEMPLATE):
    made = tokenizer()
    made.chat_template = template
    return made


def fed(language_model):
    """Lengths of the forward passes of a model."""
    seen = []
    language_model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("make", [model, attached_model])
def test_turns_equal_one_long_prompt_and_read_only_what_is_new(make):
    torch.manual_seed(0)
    language_model = make()
    seen = fed(language_model)
    talk = Conversation(language_model, tokenizer(), prefill_chunk=7)
    pieces = []
    first = talk.turn("w5 w6 w7 w8 w5 w6 w9 w10 w11 w12 w13", pieces.append, GREEDY)
    assert "".join(pieces) == first
    assert len(pieces) > 1
    assert seen[:2] == [7, 3]
    assert set(seen[2:]) == {1}
    seen.clear()
    ids = talk.ids
    second = talk.turn("w5 w6 w7", pieces.append, GREEDY)
    assert sum(seen) < 3 + 9 + 2
    fresh = make()
    new = tokenizer()("w5 w6 w7", add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted = fresh.generate(torch.cat([ids, new], 1), do_sample=False, max_new_tokens=9)
    assert torch.equal(talk.ids, wanted)
    assert second == tokenizer().decode(wanted[0, ids.shape[1] + 3 :], skip_special_tokens=True)


def test_prompt_lookup_writes_the_same_text():
    text = " ".join([passage(__import__("random").Random(0), 12)] * 3)
    found = []
    for guessed in (0, 4):
        talk = Conversation(attached_model(), tokenizer())
        settings = Sampling(max_new_tokens=15, temperature=0, prompt_lookup=guessed)
        found.append((talk.turn(text, lambda piece: None, settings), talk.ids.tolist()))
    assert found[0] == found[1]


def test_a_saved_conversation_goes_on(tmp_path):
    talk = Conversation(attached_model(), chat_tokenizer(), chat=True)
    assert talk.memory is None
    with pytest.raises(InvalidInputError, match="before the first turn"):
        talk.save(tmp_path / "s")
    talk.turn("w20 w21 w22", lambda piece: None, GREEDY)
    talk.save(tmp_path / "s")
    other = Conversation(attached_model(), chat_tokenizer(), chat=True)
    other.load(tmp_path / "s")
    assert other.messages == talk.messages
    answers = [x.turn("w23 w20", lambda piece: None, GREEDY) for x in (talk, other)]
    assert answers[0] == answers[1]
    assert torch.equal(talk.ids, other.ids)
    assert talk.memory is not None
    assert talk.memory.context == talk.cache.get_seq_length()
    with pytest.raises(CheckpointError, match="holds chat messages, not plain text"):
        Conversation(attached_model(), tokenizer()).load(tmp_path / "s")
    with pytest.raises(InvalidInputError, match="not attached"):
        Conversation(model(), chat_tokenizer(), chat=True).load(tmp_path / "s")


def test_chat_turns_are_what_the_template_says():
    talk = Conversation(attached_model(), chat_tokenizer(), chat=True)
    first = talk.turn("w20 w21", lambda piece: None, GREEDY)
    before = talk.ids.clone()
    talk.turn("w22", lambda piece: None, GREEDY)
    assert torch.equal(talk.ids[:, : before.shape[1]], before)
    read = tokenizer().decode(talk.ids[0])
    ended = "" if before[0, -1] == 2 else "<eos> "
    assert read.startswith(f"w1 w2 w20 w21 w1 w3 {first}")
    assert f"{ended}w1 w2 w22 w1 w3" in read
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_a_template_that_rewrites_earlier_turns_is_read_again():
    """Some templates keep the last message only, or drop an answer's reasoning."""
    template = "{% for m in messages %}w{{ messages|length }} {{ m.content }} {% endfor %}w1 w3 "
    talk = Conversation(attached_model(), chat_tokenizer(template), chat=True)
    first = talk.turn("w20", lambda piece: None, GREEDY)
    with pytest.warns(RuntimeWarning, match="rewrites earlier turns"):
        talk.turn("w21", lambda piece: None, GREEDY)
    assert tokenizer().decode(talk.ids[0]).startswith(f"w3 w20 w3 {first} w3 w21 w1 w3")


def test_misuse_is_named():
    with pytest.raises(InvalidInputError, match="no chat template"):
        Conversation(model(), tokenizer(), chat=True)
    with pytest.raises(InvalidInputError, match="prefill_chunk"):
        Conversation(model(), tokenizer(), prefill_chunk=0)
    talk = Conversation(model(), tokenizer())
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        talk.turn("", lambda piece: None)
    with pytest.raises(InvalidInputError, match="prompt_lookup >= 0"):
        Sampling(prompt_lookup=-1)
    with pytest.raises(InvalidInputError, match="temperature >= 0"):
        Sampling(temperature=-1)
