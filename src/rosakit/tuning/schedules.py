"""How an option of an estimator moves with training: temperatures and scales.

A schedule is a pure function of the step, so a resumed run has the value that an unbroken one has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rosakit.errors import InvalidInputError
from rosakit.ops.estimators.registry import check_options

__all__ = ["Schedule", "Shape", "read_schedules"]

Shape = Literal["constant", "linear", "cosine", "geometric"]

_SHARE: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "geometric": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` between two shares of the training.

    Attributes:
        start: value until `begin`.
        end: value from `until` on.
        shape: "linear"; "cosine" (slow at both ends); "geometric" (a constant factor a step, for
            temperatures: both ends must be positive); "constant" stays at `start`.
        begin: share of all steps at which it starts to move, 0..1.
        until: share of all steps at which it arrives, above `begin`, at most 1.
    """

    start: float
    end: float
    shape: Shape = "geometric"
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise InvalidInputError(
                f"shape must be one of {', '.join(get_args(Shape))}; got {self.shape!r}"
            )
        if not 0 <= self.begin < self.until <= 1:
            raise InvalidInputError(
                f"a schedule needs 0 <= begin < until <= 1, got {self.begin} and {self.until}"
            )
        if self.shape == "geometric" and not (self.start > 0 and self.end > 0):
            raise InvalidInputError(
                "a geometric schedule needs positive ends, got "
                f"{self.start} and {self.end}; use shape='linear' to reach zero"
            )

    def at(self, step: int, steps: int) -> float:
        """The value of step `step` (from 0) of `steps`."""
        done = step / max(1, steps)
        share = min(1.0, max(0.0, (done - self.begin) / (self.until - self.begin)))
        share = _SHARE[self.shape](share)
        if self.shape == "geometric":
            value: float = self.start * (self.end / self.start) ** share
            return value
        return self.start + (self.end - self.start) * share


def read_schedules(estimator: str, given: Mapping[str, Any]) -> dict[str, Schedule]:
    """Schedules from a configuration: option name to the fields of a `Schedule`.

    Raises:
        InvalidInputError: the estimator has no such option, or a schedule does not fit.
    """
    check_options(estimator, dict(given))
    known = [field.name for field in fields(Schedule)]
    found = {}
    for name, values in given.items():
        if not isinstance(values, Mapping) or not {"start", "end"} <= set(values) <= set(known):
            raise InvalidInputError(
                f"the schedule of {name} must be a mapping with start and end, and where wanted "
                f"{', '.join(known[2:])}; got {values!r}"
            )
        numbers = {k: v for k, v in values.items() if k != "shape"}
        if not all(type(v) in (int, float) for v in numbers.values()):
            raise InvalidInputError(f"the schedule of {name} must have numbers, got {values!r}")
        found[name] = Schedule(**values)
    return found
