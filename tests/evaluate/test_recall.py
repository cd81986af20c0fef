"""Recall tasks: exact in length, clear about what is hidden, scored as greedy decoding would."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.grids import GridResult, Outcome, gather_grid
from rosakit.evaluate.recall import copy_prompts, copying, measure_prompts, mqar, mqar_prompts
from rosakit.evaluate.scores import score_labels
from tests.tuning import texts
from tests.tuning.tiny import build, tokens


def perfect(right):
    """A scorer that gives the actual next token where `right(row, index)`, else the token 0."""

    def score(ids, mask=None, keep=None):
        logits = torch.zeros(*ids.shape, 61)
        for t in range(ids.shape[1] - 1):
            logits[0, t, ids[0, t + 1] if right(ids[0], t + 1) else 0] = 9.0
        return {"model": score_labels(logits[:, -keep - 1 : -1], ids[:, -keep:])}

    return score


def test_mqar_tells_every_pair_once_and_asks_for_it_once():
    prompts = mqar_prompts(texts.tokenizer(), [80, 120], [3, 6], samples=2, seed=1)
    assert [p.place for p in prompts] == [(n, k) for n in (80, 120) for k in (3, 6) for _ in "ab"]
    for prompt in prompts:
        assert len(prompt.ids) == prompt.place[0]
        assert len(prompt.answers) == prompt.place[1]
        told = set()
        for answer, source, asked in zip(prompt.answers, prompt.sources, prompt.asked, strict=True):
            assert prompt.ids[answer] == prompt.ids[source]
            assert prompt.ids[asked] == prompt.ids[source - 1]
            assert asked == answer - 1
            # The key stands nowhere but where it is told and where it is asked.
            assert (prompt.ids == prompt.ids[asked]).sum() == 2
            told.add(source)
        assert len(told) == prompt.place[1]
    again = mqar_prompts(texts.tokenizer(), [80, 120], [3, 6], samples=2, seed=1)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(prompts, again, strict=True))
    other = mqar_prompts(texts.tokenizer(), [80], [3], seed=2)
    assert not torch.equal(other[0].ids, prompts[0].ids)


def test_what_the_window_hides_follows_from_the_question():
    (prompt,) = mqar_prompts(texts.tokenizer(), [60], [2], samples=1)
    for source, asked, hidden in zip(
        prompt.sources, prompt.asked, prompt.beyond(window=50, sink_tokens=0), strict=True
    ):
        seen = range(asked - 49, asked + 1)  # what the first token of the question sees
        assert hidden == (source not in seen)
    assert prompt.beyond(window=50, sink_tokens=20) == [False, False]
    assert prompt.beyond(window=60, sink_tokens=0) == [False, False]


def test_copies_stand_at_their_distance():
    documents = [tokens(1, 300, kinds=50)[0]]
    prompts = copy_prompts(documents, [40, 90], [16], cue=4, samples=2)
    for prompt in prompts:
        distance, size = prompt.place
        assert len(prompt.ids) == distance + size
        assert torch.equal(prompt.ids[:size], prompt.ids[distance:])
        assert prompt.answers == tuple(range(distance + 4, distance + size))
        assert prompt.beyond(window=20, sink_tokens=0) == [True] * 12
        # A window that shows the cue's first token the last passage token hides less.
        assert prompt.beyond(window=int(distance) + 1, sink_tokens=0) == [False] * 12


def test_answers_are_counted_by_place_and_by_what_is_hidden():
    prompts = mqar_prompts(texts.tokenizer(), [60], [4], samples=3)
    hits = {int(p.ids[p.answers[0]]) for p in prompts}
    found = measure_prompts(
        perfect(lambda row, t: int(row[t]) in hits), prompts, ("length", "pairs"), window=30
    )["model"]
    (cell,) = found.cells
    assert cell.place == {"length": 60, "pairs": 4}
    assert cell.samples == 12
    expected = sum(int(p.ids[a]) in hits for p in prompts for a in p.answers)
    assert cell.correct == expected
    hidden = sum(sum(p.beyond(30, 0)) for p in prompts)
    assert cell.beyond == hidden == found.beyond
    assert GridResult.from_dict(dataclasses.asdict(found)) == found


def test_grids_add_up():
    outcomes = [
        Outcome((1, 2), True, True),
        Outcome((1, 2), False, True),
        Outcome((1, 3), True, False),
    ]
    grid = gather_grid(outcomes, ("a", "b"), window=4, sink_tokens=0, seed=0)
    assert [(c.place, c.samples, c.correct, c.beyond, c.beyond_correct) for c in grid.cells] == [
        ({"a": 1, "b": 2}, 2, 1, 2, 1),
        ({"a": 1, "b": 3}, 1, 1, 0, 0),
    ]
    assert grid.accuracy == pytest.approx(2 / 3)
    assert grid.accuracy_beyond == pytest.approx(1 / 2)


def test_a_model_is_measured():
    model = build(depth=1)
    found = mqar(model, texts.tokenizer(), [48], [3], window=16)
    assert found.samples == 6
    copied = copying(model, [tokens(1, 200)[0]], [32], [16], window=16)
    assert copied.samples == 2 * 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: mqar_prompts(t, [20], [9]), "more than 20"),
        (lambda t: mqar_prompts(t, [500], [40]), "single-token words"),
        (lambda t: mqar_prompts(t, [], [4]), "needs samples"),
        (lambda t: copy_prompts([[1] * 50], [40], [16]), "tokens of text"),
        (lambda t: copy_prompts([[1] * 500], [10], [16]), "shorter than a passage"),
        (lambda t: copy_prompts([[1] * 500], [40], [8]), "longer than the cue"),
    ],
)
def test_what_cannot_be_asked_is_said(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call(texts.tokenizer())
