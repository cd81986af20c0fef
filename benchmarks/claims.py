"""A queue of runs in a folder: processes share it by claims, and start nothing that would be late.

A run is a file ``NAME.json`` once it is finished and ``NAME.claim`` while some process has it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar


class Named(Protocol):
    """What is queued: anything whose name can name a file."""

    @property
    def name(self) -> str:
        """Unique in the queue."""
        ...


Run = TypeVar("Run", bound=Named)


def claim(folder: Path, name: str) -> bool:
    """Whether this process is the first to claim the run."""
    try:
        os.close(os.open(folder / f"{name}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def release(folder: Path, name: str) -> None:
    """Give an unfinished run back, for a later call to take up."""
    (folder / f"{name}.claim").unlink(missing_ok=True)


def unclaimed(
    runs: Iterable[Run], folder: Path, deadline: float, expected: Callable[[Run], float]
) -> Iterator[Run]:
    """Runs that this process is the first to claim, as long as they would end in time.

    Args:
        runs: the most important first.
        folder: of results and claims; made if it is missing.
        deadline: on `time.monotonic`.
        expected: seconds that a run will take; asked when its turn comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if (folder / f"{run.name}.json").exists():
            continue
        if time.monotonic() + expected(run) > deadline:
            continue
        if claim(folder, run.name):
            yield run
