"""Results of recall tasks on a grid: how many were right in each cell, and beyond the window."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GridCell", "GridResult", "Outcome", "gather_grid"]


@dataclass(frozen=True)
class GridCell:
    """One cell.

    Attributes:
        place: value on each axis.
        samples, correct: answers asked for, and those that greedy decoding would give.
        beyond, beyond_correct: those whose content the window and its sinks hide.
    """

    place: dict[str, float]
    samples: int
    correct: int
    beyond: int
    beyond_correct: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0..1; nan if none was asked for."""
        return self.correct / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class GridResult:
    """A recall task on a grid.

    Attributes:
        axes: names of the two axes, the one that is drawn across first.
        cells: in order of appearance.
        window, sink_tokens: what they do not show counts as beyond.
        seed: of everything random.
    """

    axes: tuple[str, str]
    cells: tuple[GridCell, ...]
    window: int
    sink_tokens: int
    seed: int

    @property
    def samples(self) -> int:
        """All answers."""
        return sum(cell.samples for cell in self.cells)

    @property
    def accuracy(self) -> float:
        """Share of correct answers over all cells, 0..1; nan if none was asked for."""
        return sum(c.correct for c in self.cells) / self.samples if self.samples else math.nan

    @property
    def beyond(self) -> int:
        """Answers whose content lies beyond the window."""
        return sum(cell.beyond for cell in self.cells)

    @property
    def accuracy_beyond(self) -> float:
        """Share of correct answers among those, 0..1; nan if there are none."""
        return sum(c.beyond_correct for c in self.cells) / self.beyond if self.beyond else math.nan

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridResult:
        """The inverse of `dataclasses.asdict`."""
        first, second = values["axes"]
        cells = tuple(GridCell(**cell) for cell in values["cells"])
        return cls((first, second), cells, values["window"], values["sink_tokens"], values["seed"])


@dataclass(frozen=True)
class Outcome:
    """One answer: its place, whether it was right, and whether it needed what is hidden."""

    place: tuple[float, float]
    right: bool
    beyond: bool


def gather_grid(
    outcomes: Iterable[Outcome],
    axes: tuple[str, str],
    *,
    window: int,
    sink_tokens: int,
    seed: int,
) -> GridResult:
    """Count outcomes by place."""
    counts: dict[tuple[float, float], list[int]] = {}
    for outcome in outcomes:
        cell = counts.setdefault(outcome.place, [0, 0, 0, 0])
        flags = (True, outcome.right, outcome.beyond, outcome.right and outcome.beyond)
        for index, flag in enumerate(flags):
            cell[index] += flag
    cells = tuple(
        GridCell(dict(zip(axes, place, strict=True)), *cell) for place, cell in counts.items()
    )
    return GridResult(axes, cells, window, sink_tokens, seed)
