"""What a training run shows: a progress bar and one live line of loss and health.

In a terminal both stay in place; elsewhere (a log file, a CI job) every logged step is one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LiveCallback", "counting", "health_line"]

_LABELS = {
    "match_rate": "match",
    "match_length": "length",
    "null_rate": "null",
    "entropy": "entropy",
    "entropy_worst": "worst",
    "key_token": "key",
    "next_token": "next",
    "beyond_window": "beyond",
    "flip_change": "flip",
    "candidate_rate": "candidates",
    "route_match_length": "route length",
    "route_null_rate": "route null",
    "route_beyond_window": "route beyond",
    "hit_rate": "hit",
    "first_hit_rate": "first",
    "gate": "gate",
}


def health_line(health: Mapping[str, float]) -> str:
    """Health metrics in a fixed order, for example ``match 0.93  length 2.1  null 0.07``."""
    return "  ".join(
        f"{label} {health[name]:.2f}" for name, label in _LABELS.items() if name in health
    )


def _console() -> Console:
    console = Console(stderr=True, highlight=False)
    # A log file gets each line whole; a terminal wraps what is too long for it.
    console.soft_wrap = not console.is_terminal
    return console


def _bar(console: Console, what: str) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def counting(what: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for work that reports (done, total); yields that function, or None if not shown."""
    console = _console()
    if not show or not console.is_terminal:
        yield None
        return
    bar = _bar(console, what)
    task = bar.add_task(what, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


class LiveCallback(TrainerCallback):  # type: ignore[misc]
    """Shows progress and the live line of a Trainer.

    Args:
        tokens_a_step: tokens an optimizer step, for the speed.
        show: False shows nothing.
    """

    def __init__(self, tokens_a_step: int, show: bool) -> None:
        self.tokens_a_step, self.show = tokens_a_step, show
        self.console = _console()
        self.line = Text("")
        self._screen: AbstractContextManager[Any] = nullcontext()
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = (time.perf_counter(), state.global_step)
        if self.show and self.console.is_terminal:
            self._bar = _bar(self.console, "training")
            self._task = self._bar.add_task("training", total=state.max_steps)
            self._bar.update(self._task, completed=state.global_step)
            self._screen = Live(Group(self._bar, self.line), console=self.console)
            self._screen.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not self.show or not ("loss" in logs or "eval_loss" in logs):
            return
        then, before = self._since
        now, step = time.perf_counter(), state.global_step
        parts = [f"step {step}/{state.max_steps}"]
        if "loss" in logs:
            parts.append(f"loss {logs['loss']:.4f}")
            parts.append(
                f"{(step - before) * self.tokens_a_step / max(now - then, 1e-9):.0f} tok/s"
            )
            self._since = (now, step)
        else:
            parts.append(f"held-out loss {logs['eval_loss']:.4f}")
        text = "  ".join([*parts, health_line(logs)]).rstrip()
        if self._bar is None:
            self.console.print(text)
        else:
            self.line.plain = text

    def close(self) -> None:
        """Leave the terminal as it was, also after an error; closing again does nothing."""
        self._screen.__exit__(None, None, None)
        self._screen, self._bar = nullcontext(), None
