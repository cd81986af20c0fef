"""Progress that can be followed: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from rosakit.evaluate.scores import Progress

__all__ = ["showing"]


@contextmanager
def showing(console: Console, prefix: str = "", every: float = 10.0) -> Iterator[Progress]:
    """Show the progress of what runs inside the block.

    Args:
        console: where to show it.
        prefix: put before the name of each step.
        every: seconds between two lines where the console is no terminal (a log file, a CI job).

    Yields:
        A function to be called as ``progress(what, done, total)``.
    """
    if console.is_terminal:
        with Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as bar:
            tasks: dict[str, int] = {}

            def move(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(f"{prefix}{what}", total=total)
                bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

            yield move
        return
    began = time.monotonic()
    last = {"": began}

    def line(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.get(what, began) >= every:
            last[what] = now
            console.print(f"{prefix}{what} {done}/{total}  {now - began:.0f} s", highlight=False)

    yield line
