"""Moves estimator options of a model's adapters while transformers' Trainer trains it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from rosakit.layers import RosaAdapter
from rosakit.tuning.schedules import Schedule

__all__ = ["ScheduleCallback"]


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Before every step, sets each scheduled option of every adapter to its value at that step.

    The value depends on the step alone, which the Trainer saves: a resumed run needs nothing else.

    Args:
        schedules: option name to schedule.
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        self.schedules = dict(schedules)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        values = {n: s.at(state.global_step, state.max_steps) for n, s in self.schedules.items()}
        for module in kwargs["model"].modules():
            if isinstance(module, RosaAdapter):
                module.estimator_options.update(values)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None:
            step = max(0, state.global_step - 1)
            for name, schedule in self.schedules.items():
                logs[f"estimator_{name}"] = schedule.at(step, state.max_steps)
