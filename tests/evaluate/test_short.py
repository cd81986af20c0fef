"""Short-context items: made of texts as said, and scored as lm-eval scores them."""

from __future__ import annotations

import json

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.recall import mqar_prompts
from rosakit.evaluate.scores import LabelScores, model_scorer
from rosakit.evaluate.short import make_short, measure_short, save_short
from tests.tuning import texts


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def rows():
    words = "stone river garden lantern winter " * 40
    return {"prose": [[ord(c) for c in f"{words}number {n} " * 3] for n in range(3)]}


def test_items_are_what_they_say():
    items = make_short(Letters(), rows(), count=12, seed=1)
    assert {item.task for item in items} == {"next_line_prose", "last_word_prose", "grammar"}
    assert items == make_short(Letters(), rows(), count=12, seed=1)
    texts_ = [Letters().decode(row) for row in rows()["prose"]]
    for item in items:
        if item.task == "next_line_prose":
            assert len(set(item.choices)) == 4
            whole = Letters().decode([*item.context, *item.choices[item.label]])
            assert any(whole in text for text in texts_)
        elif item.task == "last_word_prose":
            context, (word,) = item.text
            assert word.strip() in context.split()
        else:
            good = item.text[1][item.label].split()
            plural = good[1].endswith("s")
            many = {"are", "were", "have", "know", "sing", "walk", "do", "laugh"}
            assert bool(many & set(good)) == plural


def test_scores_are_those_of_single_unpadded_sequences():
    model, generator = texts.model(), torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(3, 50, (n,), generator=generator).tolist())  # noqa: E731
    from rosakit.evaluate.short import ShortItem

    items = [ShortItem("x", draw(3 + n), tuple(draw(2 + c) for c in range(4)), n % 4, ("", ()))
             for n in range(9)]  # fmt: skip
    found = measure_short(model_scorer(model), items, batch=5)["model"]["x"]
    right = 0
    for item in items:
        sums = []
        for choice in item.choices:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*item.context, *choice]])).logits[0]
            log_p = logits.log_softmax(-1)
            at = len(item.context) - 1
            sums.append(sum(float(log_p[at + i, t]) for i, t in enumerate(choice)))
        right += sums.index(max(sums)) == item.label
    assert found == right / len(items)


def test_a_last_word_counts_when_greedy_decoding_gives_all_of_it():
    from rosakit.evaluate.short import ShortItem

    def scorer(ids, mask=None, keep=None):
        greedy = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        greedy[ids[:, 0] == 2, 2] = False  # the second token of the answer
        return {"model": LabelScores(torch.zeros(greedy.shape), greedy)}

    items = [ShortItem("w", (first, 5), ((6, 7),), 0, ("", ("",))) for first in (1, 2, 1, 1)]
    assert measure_short(scorer, items)["model"]["w"] == 0.75


def test_files_have_the_public_columns(tmp_path):
    written = save_short(make_short(Letters(), rows(), count=2), tmp_path)
    read = {k: [json.loads(x) for x in p.read_text().splitlines()] for k, p in written.items()}
    assert set(read["hellaswag"][0]) == {"activity_label", "ctx_a", "ctx_b", "endings", "label"}
    assert set(read["lambada_openai"][0]) == {"text"}
    assert read["blimp_regular_plural_subject_verb_agreement_1"][0]["sentence_good"]


def test_a_count_below_one_is_refused():
    with pytest.raises(InvalidInputError, match="at least 1"):
        make_short(Letters(), rows(), count=0)


def test_mqar_in_lines_asks_for_what_was_told():
    tokenizer = texts.tokenizer()
    prompts = mqar_prompts(tokenizer, (160,), (3, 6), samples=2, form="lines", seed=4)
    for prompt in prompts:
        assert len(prompt.ids) == 160
        for answer, source, asked in zip(prompt.answers, prompt.sources, prompt.asked, strict=True):
            assert prompt.ids[answer] == prompt.ids[source]
            key = prompt.ids[asked:answer]
            assert torch.equal(key, prompt.ids[source - len(key) : source])
            assert source < asked
    with pytest.raises(InvalidInputError, match="more than"):
        mqar_prompts(tokenizer, (8,), (6,), form="lines")
    with pytest.raises(InvalidInputError, match="form of mqar"):
        mqar_prompts(tokenizer, (160,), (3,), form="line")
