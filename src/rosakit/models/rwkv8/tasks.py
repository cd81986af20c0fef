"""The demos' tasks: counting, reversing digits, adding and subtracting.

Each draws its random numbers in the order of the published scripts, so the same seed gives the
same sequences: 251014 (counting), 251024 (arithmetic), 251105 (reversal).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of one task.

    Attributes:
        tokens: int64 ``[B, T]``; models read ``[:, :-1]`` and predict ``[:, 1:]``.
        counted: bool ``[B, T - 1]``, the predictions that count (answers; everything in counting).
        sizes: what accuracy is grouped by: digits of the longer operand, or the first number.
    """

    tokens: Tensor
    counted: Tensor
    sizes: tuple[int, ...]


class Task(Protocol):
    """What training and evaluation need of a task."""

    name: str
    symbols: str
    size_name: str
    demo_seed: int
    sums_running_totals: bool

    def sample(self, rng: random.Random, batch: int) -> Batch:
        """Random sequences to train on."""
        ...

    def demo(self, rng: random.Random) -> Iterator[Batch]:
        """The published evaluation, a group of equal size a batch."""
        ...

    @property
    def length(self) -> int:
        """T."""
        ...


def _number(rng: random.Random, digits: int) -> int:
    """A random number of exactly that many digits (0 to 9 for one)."""
    low = 0 if digits == 1 else 10 ** (digits - 1)
    return rng.randint(low, 10**digits - 1)


def _padded_length(needed: int) -> int:
    """The published lengths: a multiple of 128, and one more for the last target."""
    return -(-(needed - 1) // 128) * 128 + 1


class Count:
    """Consecutive numbers, each after a separator: ``|98|99|100|101…``.

    Args:
        length: T, 128 in the demo.
        digits: largest number of digits of the first number when training.
    """

    name, symbols, size_name = "count", "0123456789|", "first number"
    demo_seed, sums_running_totals = 42, False

    def __init__(self, length: int = 128, digits: int = 3) -> None:
        if length < 2 or digits < 1:
            raise InvalidInputError(
                f"counting needs length >= 2 and digits >= 1, got {length} and {digits}"
            )
        self._length, self.digits = length, digits

    @property
    def length(self) -> int:
        return self._length

    def _from(self, first: int) -> list[int]:
        row, number = [10], first
        while len(row) < self._length:
            row += [int(c) for c in str(number)] + [10]
            number += 1
        return row[: self._length]

    def _batch(self, rows: list[list[int]], sizes: list[int]) -> Batch:
        tokens = torch.tensor(rows)
        return Batch(tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool), tuple(sizes))

    def sample(self, rng: random.Random, batch: int) -> Batch:
        rows, sizes = [], []
        for _ in range(batch):
            digits = rng.randint(1, self.digits)
            rows.append(self._from(_number(rng, digits)))
            sizes.append(digits)
        return self._batch(rows, sizes)

    def demo(self, rng: random.Random) -> Iterator[Batch]:
        for first in (3, 12, 42, 150, 525):
            yield self._batch([self._from(first)], [first])


class _Answering:
    """Tasks whose sequences are a question, a mark, an answer, and an end sign to the end."""

    symbols: str
    question_end: str
    end: str
    counts_end: bool

    def __init__(self, digits: int, length: int | None) -> None:
        needed = self._needed(digits)
        self.digits = digits
        self._length = _padded_length(needed) if length is None else length
        if digits < 1 or self._length < needed:
            raise InvalidInputError(
                f"{digits} digits need sequences of {needed} tokens, got length={self._length}; "
                "raise the length or lower the digits"
            )

    @property
    def length(self) -> int:
        return self._length

    def _needed(self, digits: int) -> int:
        raise NotImplementedError

    def _batch(self, texts: list[str], sizes: list[int]) -> Batch:
        code = {c: i for i, c in enumerate(self.symbols)}
        tokens = torch.full((len(texts), self._length), code[self.end])
        counted = torch.zeros(len(texts), self._length - 1, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor([code[c] for c in text])
            # From the mark on, up to the last answer symbol or the first end sign.
            last = len(text) - (not self.counts_end)
            counted[row, text.index(self.question_end) : last] = True
        return Batch(tokens, counted, tuple(sizes))


class Reverse(_Answering):
    """Digits, a comma, the same digits backwards: ``1234,4321####…``. The end sign counts.

    Args:
        digits: the longest number.
        length: T; by default the demo's (129 for 60 digits, 257 for 120).
    """

    name, symbols, size_name = "reverse", "0123456789,#", "digits"
    question_end, end, counts_end = ",", "#", True
    demo_seed, sums_running_totals = 42, True

    def __init__(self, digits: int = 60, length: int | None = None) -> None:
        super().__init__(digits, length)

    def _needed(self, digits: int) -> int:
        return 2 * digits + 2

    def _text(self, rng: random.Random, digits: int) -> str:
        number = str(_number(rng, digits))
        return f"{number},{number[::-1]}"

    def sample(self, rng: random.Random, batch: int) -> Batch:
        sizes = [rng.randint(1, self.digits) for _ in range(batch)]
        return self._batch([self._text(rng, size) for size in sizes], sizes)

    def demo(self, rng: random.Random) -> Iterator[Batch]:
        for size in range(1, self.digits + 1):
            yield self._batch([self._text(rng, size) for _ in range(10)], [size] * 10)


class Arithmetic(_Answering):
    """Sums and differences: ``123+45=168====…``. The end sign does not count.

    Args:
        digits: digits of the longer operand.
        length: T; by default the demo's 129 for up to 40 digits.
    """

    name, symbols, size_name = "arithmetic", "0123456789+-=", "digits"
    question_end, end, counts_end = "=", "=", False
    demo_seed, sums_running_totals = 42, True

    def __init__(self, digits: int = 20, length: int | None = None) -> None:
        super().__init__(digits, length)

    def _needed(self, digits: int) -> int:
        return 3 * digits + 4

    def _text(self, rng: random.Random, first: int, second: int) -> str:
        a, b = _number(rng, first), _number(rng, second)
        sign = rng.choice(["+", "-"])
        return f"{a}{sign}{b}={a + b if sign == '+' else a - b}"

    def sample(self, rng: random.Random, batch: int) -> Batch:
        texts, sizes = [], []
        for _ in range(batch):
            longer = rng.randint(1, self.digits)
            pair = [longer, rng.randint(1, longer)]
            rng.shuffle(pair)
            texts.append(self._text(rng, *pair))
            sizes.append(longer)
        return self._batch(texts, sizes)

    def demo(self, rng: random.Random) -> Iterator[Batch]:
        for size in range(1, self.digits + 1):
            pairs = [(i, size) if i <= size else (size, 2 * size - i) for i in range(1, 2 * size)]
            texts = [self._text(rng, *pair) for pair in pairs]
            yield self._batch(texts, [size] * len(texts))


TASKS: dict[str, Callable[..., Task]] = {
    "count": Count,
    "reverse": Reverse,
    "arithmetic": Arithmetic,
}


def make(name: str, digits: int | None = None, length: int | None = None) -> Task:
    """A task by name, with the demo's sizes where none are given.

    Raises:
        InvalidInputError: there is no such task, or the sizes do not fit.
    """
    if name not in TASKS:
        raise InvalidInputError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    sizes = {"digits": digits, "length": length}
    return TASKS[name](**{key: value for key, value in sizes.items() if value is not None})


def for_vocabulary(vocabulary: int) -> str | None:
    """The task whose symbols a vocabulary of that size stands for, None if there is none."""
    for name, task in TASKS.items():
        if len(task.symbols) == vocabulary:  # type: ignore[attr-defined]
            return name
    return None
