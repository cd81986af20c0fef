"""Recall tasks made of tokens: many keys asked for at once (MQAR), and passages copied from far.

Both are generated from a seed, need no data set, and say of every answer whether the window hides
what it needs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.evaluate.grids import GridResult, Outcome, gather_grid
from rosakit.evaluate.needles import neutral_sentences
from rosakit.evaluate.scores import Progress, Scorer, device_of, model_scorer

__all__ = ["Prompt", "copy_prompts", "copying", "measure_prompts", "mqar", "mqar_prompts"]

_WORD = re.compile(r"^[ \u2581\u0120]?[a-z]\w{1,9}$")
"""A lower-case word of two to ten letters, with the space that tokenizers put before it."""


@dataclass(frozen=True)
class Prompt:
    """A sequence, and the tokens of it that have to be recalled.

    Attributes:
        ids: int64 ``[T]``.
        answers: indices of the tokens to recall; each follows from what stands at `sources`.
        sources: index of the first telling of each answer.
        asked: index of the first token of each question: from there on nothing of the source may
            be visible for it to count as beyond a window.
        place: where the prompt stands on the grid.
    """

    ids: Tensor
    answers: tuple[int, ...]
    sources: tuple[int, ...]
    asked: tuple[int, ...]
    place: tuple[float, float]

    def beyond(self, window: int, sink_tokens: int) -> list[bool]:
        """Of each answer, whether the window and its sinks hide its source from the question."""
        return [
            source < asked + 1 - window and source >= sink_tokens
            for source, asked in zip(self.sources, self.asked, strict=True)
        ]


def mqar_prompts(
    tokenizer: Any,
    lengths: Sequence[int],
    pairs: Sequence[int],
    *,
    samples: int = 2,
    form: Literal["tokens", "lines"] = "tokens",
    seed: int = 0,
) -> list[Prompt]:
    """Multi-query associative recall (Arora et al., 2023) in words of the model's vocabulary.

    All pairs told, filler up to `length`, then all keys again in another order, each to be
    answered by its value. Keys and values are different words.

    Args:
        tokenizer: a Hugging Face tokenizer.
        lengths: tokens of a prompt.
        pairs: number of pairs; every length is combined with every number.
        samples: prompts a cell.
        form: "tokens" is the synthetic task: two tokens a pair, filler of words that mean nothing,
            for models trained on it. "lines" is the same in text that a pretrained model has seen
            the like of: ``key: value`` lines, the filler of needles, the lines again; a key is a
            word of one or more tokens, a value one token.
        seed: of everything random.

    Raises:
        InvalidInputError: sizes out of range, a length without room for the pairs, or a vocabulary
            with too few words.
    """
    if samples < 1 or not lengths or not pairs or min(pairs) < 1:
        raise InvalidInputError(
            f"mqar needs samples >= 1, lengths and numbers of pairs >= 1; got {samples}, "
            f"{list(lengths)} and {list(pairs)}"
        )
    if form not in ("tokens", "lines"):
        raise InvalidInputError(f"form of mqar must be 'tokens' or 'lines', got {form!r}")
    words = _words(tokenizer)
    if form == "lines":
        return [
            _lines_prompt(tokenizer, words, length, number, f"mqar {seed}/{length}/{number}/{n}")
            for length in lengths
            for number in pairs
            for n in range(samples)
        ]
    separator = list(tokenizer("\n", add_special_tokens=False).input_ids)[-1:]
    prefix = list(tokenizer("").input_ids)
    prompts = []
    for length in lengths:
        for number in pairs:
            if len(words) < 2 * number + 8:
                raise InvalidInputError(
                    f"{number} pairs need {2 * number + 8} single-token words, this vocabulary "
                    f"has {len(words)}; ask for fewer pairs"
                )
            for sample in range(samples):
                random_ = random.Random(f"mqar {seed}/{length}/{number}/{sample}")
                chosen = random_.sample(words, 2 * number + 8)
                keys, values = chosen[:number], chosen[number : 2 * number]
                # Filler from words that are neither keys nor values.
                rest = chosen[2 * number :]
                size = 2 + len(separator)
                room = length - len(prefix) - 2 * number * size
                if room < 0:
                    raise InvalidInputError(
                        f"mqar with {number} pairs takes {length - room} tokens, more than "
                        f"{length}; use longer prompts or fewer pairs"
                    )
                ids = list(prefix)
                told = {}
                for key, value in zip(keys, values, strict=True):
                    told[key] = len(ids) + 1
                    ids += [key, value, *separator]
                ids += [random_.choice(rest) for _ in range(room)]
                order = list(zip(keys, values, strict=True))
                random_.shuffle(order)
                answers, sources, asked = [], [], []
                for key, value in order:
                    asked.append(len(ids))
                    sources.append(told[key])
                    answers.append(len(ids) + 1)
                    ids += [key, value, *separator]
                prompts.append(
                    Prompt(
                        torch.tensor(ids),
                        tuple(answers),
                        tuple(sources),
                        tuple(asked),
                        (length, number),
                    )
                )
    return prompts


def _lines_prompt(
    tokenizer: Any, words: Sequence[int], length: int, number: int, name: str
) -> Prompt:
    """One prompt of the form "lines"."""
    random_ = random.Random(name)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    if len(words) < 2 * number:
        raise InvalidInputError(
            f"{number} pairs need {2 * number} words, this vocabulary has {len(words)}; ask for "
            "fewer pairs"
        )
    chosen = random_.sample(words, 2 * number)
    keys = [encode(tokenizer.decode([key]).strip() + ":") for key in chosen[:number]]
    told = list(zip(keys, chosen[number:], strict=True))
    asked_for = random_.sample(told, number)
    line = encode("\n")
    prefix = list(tokenizer("").input_ids)
    used = len(prefix) + len(line) + 2 * sum(len(key) + 1 + len(line) for key, _ in told)
    if used > length:
        raise InvalidInputError(
            f"mqar with {number} pairs takes {used} tokens, more than {length}; use longer prompts "
            "or fewer pairs"
        )
    ids, place = list(prefix), {}
    for key, value in told:
        place[value] = len(ids) + len(key)
        ids += [*key, value, *line]
    hay = encode(neutral_sentences(name))
    ids += [hay[i % len(hay)] for i in range(length - used)] + line
    answers, asked = [], []
    for key, value in asked_for:
        asked.append(len(ids))
        ids += key
        answers.append(len(ids))
        ids += [value, *line]
    sources = tuple(place[value] for _, value in asked_for)
    return Prompt(torch.tensor(ids), tuple(answers), sources, tuple(asked), (length, number))


def copy_prompts(
    documents: Sequence[Sequence[int] | Tensor],
    distances: Sequence[int],
    passages: Sequence[int],
    *,
    cue: int = 8,
    samples: int = 2,
    seed: int = 0,
) -> list[Prompt]:
    """A passage of real text, other text, and the passage once more: the second one is recalled.

    Args:
        documents: token ids of texts to cut from; passage and filler come from different places.
        distances: tokens between the beginnings of the two copies.
        passages: tokens of the passage.
        cue: first tokens of the second copy, which are not asked for.
        samples: prompts a cell.
        seed: of everything random.

    Raises:
        InvalidInputError: sizes out of range, or too little text.
    """
    if samples < 1 or cue < 1 or not distances or not passages or min(passages) <= cue:
        raise InvalidInputError(
            f"copying needs samples >= 1, cue >= 1, distances and passages longer than the cue; "
            f"got {samples}, {cue}, {list(distances)} and {list(passages)}"
        )
    if min(distances) < max(passages):
        raise InvalidInputError(
            f"a distance of {min(distances)} tokens is shorter than a passage of {max(passages)}"
        )
    text = [int(t) for document in documents for t in document]
    needed = max(distances) + max(passages)
    if len(text) < 2 * needed:
        raise InvalidInputError(
            f"copying over {max(distances)} tokens needs {2 * needed} tokens of text, there are "
            f"{len(text)}"
        )
    prompts = []
    for distance in distances:
        for size in passages:
            for sample in range(samples):
                random_ = random.Random(f"copy {seed}/{distance}/{size}/{sample}")
                start = random_.randrange(len(text))
                turn = [text[(start + i) % len(text)] for i in range(distance + size)]
                # The filler lies behind the passage in another part of the text.
                far = (start + len(text) // 2) % len(text)
                filler = [text[(far + i) % len(text)] for i in range(distance - size)]
                passage = turn[:size]
                ids = [*passage, *filler, *passage]
                answers = tuple(range(distance + cue, distance + size))
                prompts.append(
                    Prompt(
                        torch.tensor(ids),
                        answers,
                        tuple(a - distance for a in answers),
                        # What the cue sees, later layers pass on; so it counts from the cue.
                        (distance,) * len(answers),
                        (distance, size),
                    )
                )
    return prompts


def measure_prompts(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    axes: tuple[str, str],
    *,
    window: int,
    sink_tokens: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    what: str = "recall",
    progress: Progress | None = None,
) -> dict[str, GridResult]:
    """Score every answer of every prompt with all variants of a scorer.

    An answer is right if it is the most probable token there, given all that precedes it.
    """
    if window < 1 or not prompts:
        raise InvalidInputError(f"{what} needs window >= 1 and prompts; got {window}")
    outcomes: dict[str, list[Outcome]] = {}
    for done, prompt in enumerate(prompts, start=1):
        hidden = prompt.beyond(window, sink_tokens)
        keep = len(prompt.ids) - min(prompt.answers)
        for name, scores in scorer(prompt.ids[None].to(device), keep=keep).items():
            first = len(prompt.ids) - scores.greedy.shape[1]
            for answer, beyond in zip(prompt.answers, hidden, strict=True):
                right = bool(scores.greedy[0, answer - first])
                outcomes.setdefault(name, []).append(Outcome(prompt.place, right, beyond))
        if progress is not None:
            progress(what, done, len(prompts))
    return {
        name: gather_grid(found, axes, window=window, sink_tokens=sink_tokens, seed=seed)
        for name, found in outcomes.items()
    }


def mqar(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    pairs: Sequence[int] = (4, 16),
    *,
    window: int,
    sink_tokens: int = 0,
    samples: int = 2,
    form: Literal["tokens", "lines"] = "tokens",
    seed: int = 0,
    progress: Progress | None = None,
) -> GridResult:
    """Multi-query associative recall of one model, see `mqar_prompts`."""
    prompts = mqar_prompts(tokenizer, lengths, pairs, samples=samples, form=form, seed=seed)
    return measure_prompts(
        model_scorer(model),
        prompts,
        ("length", "pairs"),
        window=window,
        sink_tokens=sink_tokens,
        seed=seed,
        device=device_of(model),
        what="mqar",
        progress=progress,
    )["model"]


def copying(
    model: Any,
    documents: Sequence[Sequence[int] | Tensor],
    distances: Sequence[int],
    passages: Sequence[int] = (64,),
    *,
    window: int,
    sink_tokens: int = 0,
    samples: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> GridResult:
    """Share of the tokens of a repeated passage that one model continues, see `copy_prompts`."""
    prompts = copy_prompts(documents, distances, passages, samples=samples, seed=seed)
    return measure_prompts(
        model_scorer(model),
        prompts,
        ("distance", "passage"),
        window=window,
        sink_tokens=sink_tokens,
        seed=seed,
        device=device_of(model),
        what="copying",
        progress=progress,
    )["model"]


def _words(tokenizer: Any) -> list[int]:
    """Ids of single-token words, in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return sorted(i for word, i in vocabulary.items() if _WORD.match(word) and i not in special)
