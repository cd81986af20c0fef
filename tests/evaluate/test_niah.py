"""Needles: prompts, what lies beyond the window, and agreement with greedy decoding."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rosakit.errors import InvalidInputError
from rosakit.evaluate import make_needles, niah
from rosakit.evaluate.niah import measure_niah
from rosakit.evaluate.scores import LabelScores, model_scorer


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens or not text
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def decode(self, ids):
        return "".join(chr(int(i)) for i in ids)


class Copier(nn.Module):
    """Predicts what followed the longest earlier match of the last tokens, if it sees it."""

    def __init__(self, window=10**9):
        super().__init__()
        self.window = window
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 128)
        for b, row in enumerate(input_ids.tolist()):
            lengths = [0] * (len(row) + 1)
            for i in range(len(row)):
                lengths = [0] + [
                    lengths[j] + 1 if j < i and row[j] == row[i] else 0 for j in range(len(row))
                ]
                best = max(range(max(0, i - self.window + 1), i + 1), key=lambda j: (lengths[j], j))
                if best > 0 and lengths[best] > 0:
                    logits[b, i, row[best]] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("question", ["repeat", "paraphrase"])
def test_prompts_are_exact_and_hold_the_needle(question):
    tokenizer = Letters()
    needles = make_needles(tokenizer, (300, 400), (0, 0.5, 1), samples=2, question=question, seed=3)
    assert len(needles) == 12
    for needle in needles:
        key, value = needle.text.split(": ")
        text = tokenizer.decode(needle.ids)
        assert len(needle.ids) == needle.length
        assert text.endswith(value)
        assert tokenizer.decode(needle.ids[needle.answer :]) == f" {value}"
        assert tokenizer.decode(needle.ids[: needle.end]).endswith(
            f" The special magic number for {key} is {value}."
        )
        assert text.count(value) == 2
        straw = needle.length - (needle.length - needle.answer) - needle.end
        if needle.depth == 0:
            assert text.startswith(" The special magic number")
        if needle.depth == 1:
            assert straw < 64 + 150  # a sentence end, and the question
    again = make_needles(tokenizer, (300, 400), (0, 0.5, 1), samples=2, question=question, seed=3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(needles, again, strict=True))
    other = make_needles(tokenizer, (300, 400), (0, 0.5, 1), samples=2, question=question, seed=4)
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(needles, other, strict=True))


def test_needles_stand_after_a_sentence_of_the_given_haystack():
    hay = "abcdefghij. " * 50
    tokenizer = Letters()
    (needle,) = make_needles(tokenizer, (400,), (0.5,), samples=1, haystack=hay)
    before = tokenizer.decode(needle.ids[: needle.end]).split(" The special")[0]
    assert before.endswith(".")
    assert set(before) <= set(hay)


def test_beyond_the_window_means_that_nothing_of_the_needle_is_seen():
    (needle,) = make_needles(Letters(), (400,), (0.2,), samples=1)
    assert bytes(needle.ids[needle.question :].tolist()).startswith(b"\nWhat is")
    # One token too short for the question's first token to reach the needle's last one.
    window = needle.question - (needle.end - 1)
    assert needle.beyond(window)
    assert not needle.beyond(window + 1)
    assert needle.beyond(window, sink_tokens=needle.start)
    assert not needle.beyond(window, sink_tokens=needle.start + 1)


def test_prompts_start_as_every_text_does():
    class Marked(Letters):
        def __call__(self, text, add_special_tokens=True):
            ids = [ord(c) for c in text]
            return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    (needle,) = make_needles(Marked(), (400,), (0.0,), samples=1)
    assert needle.ids[0] == 1
    assert (needle.ids[1:] != 1).all()
    assert len(needle.ids) == 400
    assert needle.start == 1
    assert Letters().decode(needle.ids[needle.start : needle.end]).startswith(" The special")


def test_a_copier_answers_all_and_a_windowed_one_only_what_it_sees():
    options = {"window": 150, "samples": 1, "seed": 1}
    grid = (400, 500), (0.0, 1.0)
    free = niah(Copier(), Letters(), *grid, **options)
    near = niah(Copier(150), Letters(), *grid, **options)
    assert free.samples == near.samples == 4
    assert free.accuracy == free.accuracy_beyond == 1
    assert near.accuracy_beyond == 0
    for cell in near.cells:
        assert cell.correct == cell.samples - cell.beyond
    assert near.beyond == 2


def test_batches_give_the_same_grid():
    needles = make_needles(Letters(), (260, 300), (0.0, 1.0), samples=2)
    one = measure_niah(model_scorer(Copier(150)), needles, window=150)
    many = measure_niah(model_scorer(Copier(150)), needles, window=150, batch_size=3)
    assert one == many


def test_every_answer_token_has_to_be_right():
    needles = make_needles(Letters(), (300,), (0.0,), samples=2)

    def scorer(wrong):
        def score(input_ids, mask=None, keep=None):
            greedy = torch.ones(len(input_ids), keep, dtype=torch.bool)
            greedy[0, wrong] = False
            return {"x": LabelScores(greedy.float(), greedy)}

        return score

    for place in (0, 3, -1):
        found = measure_niah(scorer(place), needles, window=10, batch_size=2)
        assert found["x"].accuracy == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (60,)}, "no room"),
        ({"depths": (1.5,)}, "0..1"),
        ({"samples": 0}, "samples"),
        ({"lengths": ()}, "lengths"),
        ({"question": "why"}, "repeat, paraphrase"),
        ({"haystack": ""}, "haystack"),
        ({"window": 0}, "window"),
    ],
)
def test_bad_input(changes, message):
    options = {"lengths": (300,), "depths": (0.5,), "window": 20, **changes}
    with pytest.raises(InvalidInputError, match=message):
        niah(Copier(), Letters(), options.pop("lengths"), options.pop("depths"), **options)


@pytest.mark.parametrize("confusable", [False, True])
def test_distractors_are_other_needles_of_the_same_form(confusable):
    prompts = make_needles(
        Letters(), [1500], [0.0, 0.5, 1.0], samples=4, distractors=5, confusable=confusable
    )
    for needle in prompts:
        assert len(needle.ids) == 1500
        text = "".join(map(chr, needle.ids.tolist()))
        told = dict(re.findall(r"The special magic number for (\w+ \w+) is (\d+)\.", text))
        key, value = needle.text.split(": ")
        assert told.pop(key) == value
        assert len(told) == 5
        assert value not in told.values()
        shares = [set(k.split()) & set(key.split()) for k in told]
        assert all(len(s) == (1 if confusable else 0) for s in shares)
        span = text[needle.start : needle.end]
        assert f"{key} is {value}." in span


def test_too_many_distractors_are_refused():
    with pytest.raises(InvalidInputError, match="distractors must be"):
        make_needles(Letters(), [400], [0.5], distractors=99)
