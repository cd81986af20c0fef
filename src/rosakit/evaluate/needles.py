"""Needle-in-a-haystack prompts: seeded, exact in length, and clear about what the window hides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError

__all__ = ["Needle", "Question", "make_needles", "neutral_sentences"]

Question = Literal["repeat", "paraphrase"]

_ADJECTIVES = (  # noqa: SIM905
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lonely mellow nimble olive "
    "proud quiet rusty silent tidy upbeat vivid wooden young"
).split()
_NOUNS = (  # noqa: SIM905
    "anchor basket candle donkey engine falcon garden hammer island jacket kettle ladder mirror "
    "needle orchard pencil quarry river saddle tunnel umbrella violin window yacht"
).split()
_SENTENCES = (  # noqa: SIM905
    "The road follows the river for a while. A kettle stands on the stove. It rained in the night. "
    "Somebody left the gate open. The shop closes at six. Two boats lie in the harbour. The bread "
    "is still warm. Birds sit on the wire. The train was late again. Her coat hangs by the door. "
    "The soup needs salt. A child counts the steps. The lamp flickers and goes out. We walked back "
    "through the field. The clock in the hall has stopped. Snow covers the roofs. He reads the "
    "letter twice. The dog sleeps under the table. Apples fall from the tree. The wind turns to "
    "the north. They wait for the bus. The paint is not dry yet. Nobody answers the bell. The path "
    "ends at the wall."
).split(". ")

_NEEDLE = " The special magic number for {key} is"
_QUESTIONS: dict[str, str] = {
    "repeat": (
        "\nWhat is the special magic number for {key}? The special magic number for {key} is"
    ),
    "paraphrase": (
        "\nWhat is the special magic number for {key} mentioned in the text above? The text says "
        "that it is"
    ),
}


@dataclass(frozen=True)
class Needle:
    """One prompt with its answer.

    Attributes:
        ids: int64 ``[T]``, prompt and answer.
        start, end: the needle's first token, and the index after its last.
        question: index of the first token of the question.
        answer: index of the first answer token; the answer runs to the end.
        length, depth: the cell of the grid.
        text: the needle in words.
    """

    ids: Tensor
    start: int
    end: int
    question: int
    answer: int
    length: int
    depth: float
    text: str

    def beyond(self, window: int, sink_tokens: int = 0) -> bool:
        """Whether no position of the question or the answer sees any of the needle.

        The first of them is `question`, and it sees ``question + 1 - window`` onwards, and the
        sinks. The question counts, because what it sees the next layer passes on to the answer.
        """
        return self.end <= self.question + 1 - window and self.start >= sink_tokens


def make_needles(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int = 2,
    haystack: str | None = None,
    question: Question = "repeat",
    distractors: int = 0,
    confusable: bool = False,
    seed: int = 0,
) -> list[Needle]:
    """Prompts of exactly `length` tokens (answer included) with a needle at each depth.

    The needle says ``The special magic number for KEY is VALUE.`` and the question asks for it,
    ending in the needle's own words ("repeat") or in other ones ("paraphrase"). Keys, values and
    the stretch of haystack differ from sample to sample and depend on the seed alone.

    Args:
        tokenizer: called with a text; returns an object with ``input_ids``. What it puts before
            every text (a beginning-of-sequence token, say) starts each prompt.
        lengths: tokens.
        depths: 0 (start of the haystack) to 1 (its end).
        samples: prompts a cell.
        haystack: text to hide needles in; None for neutral short sentences.
        question: how it is asked.
        distractors: other needles with other keys and values, at random depths.
        confusable: the others share a word with the key that is asked for.
        seed: of everything random.

    Raises:
        InvalidInputError: a length too small for needle and question, a depth outside 0..1, an
            unknown question, no samples, too many distractors, or a haystack without text.
    """
    if question not in _QUESTIONS:
        raise InvalidInputError(
            f"question must be one of {', '.join(_QUESTIONS)}; got {question!r}"
        )
    if samples < 1 or not lengths or not depths:
        raise InvalidInputError(
            f"needles need samples >= 1, lengths and depths; got {samples}, {list(lengths)} and "
            f"{list(depths)}"
        )
    if not 0 <= distractors <= len(_NOUNS) - 1:
        raise InvalidInputError(
            f"distractors must be in 0..{len(_NOUNS) - 1}, since keys differ; got {distractors}"
        )
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    if outside:
        raise InvalidInputError(f"depths must be in 0..1, got {outside}")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    prefix = list(tokenizer("").input_ids)
    hay = encode(neutral_sentences(seed) if haystack is None else haystack)
    if not hay:
        raise InvalidInputError("the haystack holds no tokens; give a text")
    boundaries = {index for text in (".", "!", "?", "\n") for index in encode(text)[-1:]}
    needles = []
    for length in lengths:
        for depth in depths:
            for sample in range(samples):
                # A string seed is hashed by its text: the same prompt on every machine.
                random_ = random.Random(f"{seed}/{length}/{depth}/{sample}")
                words = (random_.choice(_ADJECTIVES), random_.choice(_NOUNS))
                key = " ".join(words)
                value = str(random_.randrange(10**6, 10**7))
                needle = encode(_NEEDLE.format(key=key) + f" {value}.")
                others = [
                    encode(_NEEDLE.format(key=k) + f" {random_.randrange(10**6, 10**7)}.")
                    for k in _other_keys(words, distractors, confusable, random_)
                ]
                asked = encode(_QUESTIONS[question].format(key=key))
                answer = encode(f" {value}")
                room = length - len(prefix) - len(needle) - len(asked) - len(answer)
                room -= sum(map(len, others))
                if room < 0:
                    raise InvalidInputError(
                        f"a prompt of {length} tokens has no room for needle and question, which "
                        f"take {length - room} with this tokenizer; use longer ones"
                    )
                start = random_.randrange(len(hay))
                straw = [hay[(start + i) % len(hay)] for i in range(room)]
                place = _sentence_end(straw, round(depth * room), boundaries)
                # Places in the haystack itself, filled from the back: no needle splits another.
                spots = sorted(
                    (_sentence_end(straw, random_.randrange(room + 1), boundaries) for _ in others),
                    reverse=True,
                )
                before, after = straw[:place], straw[place:]
                for spot, other in zip(spots, others, strict=True):
                    part, at = (before, spot) if spot < place else (after, spot - place)
                    part[at:at] = other
                ids = [*prefix, *before, *needle, *after, *asked, *answer]
                begin = len(prefix) + len(before)
                needles.append(
                    Needle(
                        torch.tensor(ids),
                        start=begin,
                        end=begin + len(needle),
                        question=length - len(answer) - len(asked),
                        answer=length - len(answer),
                        length=length,
                        depth=depth,
                        text=f"{key}: {value}",
                    )
                )
    return needles


def _other_keys(
    words: tuple[str, str], count: int, confusable: bool, random_: random.Random
) -> list[str]:
    """Keys that are not the one asked for, but share a word with it where they should confuse."""
    adjective, noun = words
    if confusable:
        near = [f"{adjective} {other}" for other in _NOUNS if other != noun]
        near += [f"{other} {noun}" for other in _ADJECTIVES if other != adjective]
        return random_.sample(near, count)
    nouns = random_.sample([other for other in _NOUNS if other != noun], count)
    adjectives = [other for other in _ADJECTIVES if other != adjective]
    return [f"{random_.choice(adjectives)} {other}" for other in nouns]


def _sentence_end(straw: list[int], place: int, boundaries: set[int]) -> int:
    """The nearest place at or before `place` that follows a sentence; `place` if none is near."""
    for candidate in range(place, max(0, place - 64), -1):
        if straw[candidate - 1] in boundaries:
            return candidate
    return place


def neutral_sentences(seed: int | str) -> str:
    """Text that says nothing of interest: 2,000 short sentences in an order of their own."""
    random_ = random.Random(f"haystack {seed}")
    sentences = [sentence.rstrip(".") for sentence in _SENTENCES]
    return "".join(f" {random_.choice(sentences)}." for _ in range(2000))
