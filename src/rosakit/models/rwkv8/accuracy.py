"""Accuracy on a demo's task, counted plainly and counted as the published scripts do."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.models.rwkv8.models import RosaModel
from rosakit.models.rwkv8.tasks import Batch, Task


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Right predictions of counted tokens.

    Attributes:
        task: the task's name.
        size_name: what the sizes are ("digits").
        by_size: ``{size: (right, counted)}`` in the order of evaluation.
    """

    task: str
    size_name: str
    by_size: dict[int, tuple[int, int]]

    @property
    def tokens(self) -> tuple[int, int]:
        """Right and counted tokens, each token once."""
        right, counted = zip(*self.by_size.values(), strict=True)
        return sum(right), sum(counted)

    @property
    def running_total(self) -> tuple[int, int]:
        """The published scripts' SUM line: after every size they add up the totals *so far*.

        A token of the shortest size counts as often as there are sizes, one of the longest once.
        """
        right = counted = right_sum = counted_sum = 0
        for size_right, size_counted in self.by_size.values():
            right += size_right
            counted += size_counted
            right_sum += right
            counted_sum += counted
        return right_sum, counted_sum

    @property
    def share(self) -> float:
        """Plain token accuracy, 0 to 1."""
        right, counted = self.tokens
        return right / counted

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "size_name": self.size_name,
            "by_size": {str(size): list(pair) for size, pair in self.by_size.items()},
            "tokens": list(self.tokens),
            "running_total": list(self.running_total),
        }


def predict(model: RosaModel, tokens: Tensor) -> Tensor:
    """Most likely next tokens: int64 ``[B, T]`` to ``[B, T]``."""
    device = next(model.parameters()).device
    best: Tensor = model(tokens.to(device)).argmax(-1).cpu()
    return best


@torch.no_grad()
def evaluate(
    model: RosaModel,
    task: Task,
    seed: int | None = None,
    show: Callable[[Batch, Tensor], None] | None = None,
) -> Accuracy:
    """Run the published evaluation of a task.

    Args:
        model: a model of the task's vocabulary.
        task: from `rosakit.models.rwkv8.tasks.make`.
        seed: of the questions; the demo's by default.
        show: called with every batch and its predictions ``[B, T - 1]``.

    Raises:
        InvalidInputError: the model has another vocabulary.
    """
    check_vocabulary(model, task)
    was_training = model.training
    model.eval()
    rng = random.Random(task.demo_seed if seed is None else seed)
    by_size: dict[int, tuple[int, int]] = {}
    try:
        for batch in task.demo(rng):
            answers = predict(model, batch.tokens[:, :-1])
            _count(by_size, batch, answers)
            if show is not None:
                show(batch, answers)
    finally:
        model.train(was_training)
    return Accuracy(task.name, task.size_name, by_size)


@torch.no_grad()
def by_length(model: RosaModel, batch: Batch, task: Task) -> Accuracy:
    """Accuracy on sequences as training draws them, by the batch's sizes."""
    by_size: dict[int, tuple[int, int]] = {}
    _count(by_size, batch, predict(model, batch.tokens[:, :-1]))
    return Accuracy(task.name, "digits", dict(sorted(by_size.items())))


def check_vocabulary(model: RosaModel, task: Task) -> None:
    """Refuse a model that was not made for the task.

    Raises:
        InvalidInputError: the vocabularies differ in size.
    """
    if model.vocabulary != len(task.symbols):
        raise InvalidInputError(
            f"task {task.name} has {len(task.symbols)} symbols ({task.symbols}) but the model has "
            f"a vocabulary of {model.vocabulary}; choose the task that it was trained on"
        )


def _count(by_size: dict[int, tuple[int, int]], batch: Batch, answers: Tensor) -> None:
    right = (answers == batch.tokens[:, 1:]) & batch.counted
    for row, size in enumerate(batch.sizes):
        before = by_size.get(size, (0, 0))
        by_size[size] = (
            before[0] + int(right[row].sum()),
            before[1] + int(batch.counted[row].sum()),
        )
