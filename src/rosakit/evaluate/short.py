"""Short-context tasks made of local texts: what a memory must not cost where a window suffices.

The public sets have to be downloaded. These three have their forms and need nothing but held-out
texts: the next line among four (HellaSwag's form), the last word of a passage (LAMBADA's), and the
grammatical one of two sentences (BLiMP's). Scores are lm-eval's: the choice of the highest summed
log probability, and for last words what greedy decoding would give. `save_short` writes files of
the public formats, for lm-eval itself.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.scores import Progress, Scorer

__all__ = ["ShortItem", "make_short", "measure_short", "save_short"]

_CONTEXT, _ENDING = 96, 24
"""Tokens of the context of endings and last words, and of an ending at most."""

_SINGULAR = ("author", "teacher", "farmer", "doctor", "pilot", "dancer", "guard", "senator")
_PLURAL = tuple(f"{word}s" for word in _SINGULAR)
_PLACES = ("near the gates", "beside the rivers", "behind the walls", "next to the cars")
_PLACE = ("near the gate", "beside the river", "behind the wall", "next to the car")
_VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("knows", "know"), ("sings", "sing"),
          ("walks", "walk"), ("does", "do"), ("laughs", "laugh"))  # fmt: skip
_TAILS = ("here", "every day", "at the moment", "in the morning", "with a friend", "very well")


@dataclass(frozen=True)
class ShortItem:
    """One question.

    Attributes:
        task: "next_line", "last_word" or "grammar", with the kind of text it was made of.
        context: token ids of what is given.
        choices: token ids of what may follow; a last word has one.
        label: index of the right one.
        text: context and choices in words.
    """

    task: str
    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    label: int
    text: tuple[str, tuple[str, ...]]


def make_short(
    tokenizer: Any,
    documents: Mapping[str, Sequence[Sequence[int]]],
    *,
    count: int = 500,
    seed: int = 0,
) -> list[ShortItem]:
    """Items of all three tasks.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: held-out token ids by kind of text.
        count: items a task and kind at most; short texts give fewer.
        seed: of everything random.

    Raises:
        InvalidInputError: count below 1.
    """
    if count < 1:
        raise InvalidInputError(f"count of short-context items must be at least 1, got {count}")
    items: list[ShortItem] = []
    for kind, rows in documents.items():
        for task, make in (("next_line", _next_line), ("last_word", _last_word)):
            random_ = random.Random(f"{task} {seed}/{kind}")
            made: list[ShortItem] = []
            for tries in range(4 * count):
                row = rows[tries % len(rows)]
                found = make(tokenizer, row, f"{task}_{kind}", random_)
                if found is not None:
                    made.append(found)
                if len(made) == count:
                    break
            items += made
    random_ = random.Random(f"grammar {seed}")
    return items + [_grammar(tokenizer, random_) for _ in range(count)]


def measure_short(
    scorer: Scorer,
    items: Sequence[ShortItem],
    *,
    device: torch.device | str = "cpu",
    batch: int = 32,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of each task, by variant of the scorer.

    Sequences of like length share a forward pass, padded on the right.
    """
    rows = [
        (index, choice, [*item.context, *tokens])
        for index, item in enumerate(items)
        for choice, tokens in enumerate(item.choices)
    ]
    rows.sort(key=lambda row: len(row[2]))
    rated: dict[str, dict[tuple[int, int], tuple[float, bool]]] = {}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        length = max(len(ids) for _, _, ids in part)
        table = torch.tensor([ids + ids[-1:] * (length - len(ids)) for _, _, ids in part])
        own = torch.tensor([len(ids) for _, _, ids in part])
        mask = torch.arange(length) < own[:, None]
        for name, scores in scorer(table.to(device), mask.to(device)).items():
            for line, (index, choice, ids) in enumerate(part):
                begin = len(items[index].context) - 1
                where = slice(begin, len(ids) - 1)
                rated.setdefault(name, {})[index, choice] = (
                    float(scores.log_prob[line, where].double().sum()),
                    bool(scores.greedy[line, where].all()),
                )
        if progress is not None:
            progress("short contexts", min(start + batch, len(rows)), len(rows))
    out: dict[str, dict[str, float]] = {}
    for name, found in rated.items():
        right: dict[str, list[bool]] = {}
        for index, item in enumerate(items):
            if len(item.choices) == 1:
                correct = found[index, 0][1]
            else:
                sums = [found[index, choice][0] for choice in range(len(item.choices))]
                correct = max(range(len(sums)), key=sums.__getitem__) == item.label
            right.setdefault(item.task, []).append(correct)
        out[name] = {task: sum(r) / len(r) for task, r in right.items()}
    return out


def save_short(items: Sequence[ShortItem], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Files for `harness(..., local=...)`: by task of lm-eval a ``.jsonl`` with its columns.

    Endings are HellaSwag's columns (``lm-eval`` cleans their texts as it does its own), last words
    LAMBADA's, and sentence pairs BLiMP's.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        context, choices = item.text
        if item.task.startswith("next_line"):
            entry: dict[str, Any] = {
                "activity_label": "Text", "ctx_a": context, "ctx_b": "", "endings": list(choices),
                "label": str(item.label),
            }  # fmt: skip
            lines.setdefault("hellaswag", []).append(entry)
        elif item.task.startswith("last_word"):
            lines.setdefault("lambada_openai", []).append({"text": context + choices[0]})
        else:
            good, bad = choices[item.label], choices[1 - item.label]
            task = "blimp_regular_plural_subject_verb_agreement_1"
            lines.setdefault(task, []).append({"sentence_good": good, "sentence_bad": bad})
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = {}
    for task, entries in lines.items():
        written[task] = place / f"{task}.jsonl"
        written[task].write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return written


def _next_line(
    tokenizer: Any, row: Sequence[int], task: str, random_: random.Random
) -> ShortItem | None:
    """What follows in a text, among three stretches of the same text from elsewhere."""
    room = len(row) - _CONTEXT - _ENDING
    if room < 8 * _ENDING:
        return None
    at = random_.randrange(room)
    context = [int(t) for t in row[at : at + _CONTEXT]]
    places = [at + _CONTEXT]
    for _ in range(64):
        other = random_.randrange(len(row) - _ENDING)
        apart = all(abs(other - p) >= 2 * _ENDING for p in places)
        if apart and not at - _ENDING < other < at + _CONTEXT:
            places.append(other)
        if len(places) == 4:
            break
    if len(places) < 4:
        return None
    endings = [tuple(int(t) for t in row[p : p + _ENDING]) for p in places]
    order = random_.sample(range(4), 4)
    choices = tuple(endings[i] for i in order)
    if len(set(choices)) < 4:
        return None
    words = tuple(tokenizer.decode(list(c)) for c in choices)
    text = (tokenizer.decode(context), words)
    return ShortItem(task, tuple(context), choices, order.index(0), text)


def _last_word(
    tokenizer: Any, row: Sequence[int], task: str, random_: random.Random
) -> ShortItem | None:
    """A passage that ends in a word of four letters or more which occurred before in it."""
    if len(row) < _CONTEXT + 1:
        return None
    at = random_.randrange(len(row) - _CONTEXT)
    words = tokenizer.decode([int(t) for t in row[at : at + _CONTEXT]]).split(" ")
    for last in range(len(words) - 2, len(words) // 2, -1):
        word = words[last]
        if len(word) >= 4 and word.isalpha() and word in words[: last - 1]:
            context, ending = " ".join(words[:last]), f" {word}"
            ids = tokenizer(context, add_special_tokens=False).input_ids
            tail = tokenizer(ending, add_special_tokens=False).input_ids
            if not ids or not tail:
                return None
            return ShortItem(task, tuple(ids), (tuple(tail),), 0, (context, (ending,)))
    return None


def _grammar(tokenizer: Any, random_: random.Random) -> ShortItem:
    """Subject and verb agree across a noun of the other number, or do not."""
    plural = random_.random() < 0.5
    which = random_.randrange(len(_SINGULAR))
    subject = (_PLURAL if plural else _SINGULAR)[which]
    between = random_.choice(_PLACE if plural else _PLACES)
    verb = random_.choice(_VERBS)
    tail = random_.choice(_TAILS)
    both = tuple(f"The {subject} {between} {v} {tail}." for v in verb)
    # The first token is the given context: a model without a start token predicts none.
    ids = [tuple(tokenizer(s, add_special_tokens=False).input_ids) for s in both]
    choices = tuple(i[1:] for i in ids)
    return ShortItem("grammar", ids[0][:1], choices, int(plural), ("", both))
