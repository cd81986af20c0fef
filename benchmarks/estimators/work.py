"""Fill a number of seconds with the plan: several processes on each GPU, one claim a training.

A training that does not end in time is dropped and may be taken up by a later call with the same
folder; a finished one is a file there, and is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import release, unclaimed
from benchmarks.estimators import results
from benchmarks.estimators.plan import Planned, plain, plan
from benchmarks.estimators.variants import VARIANTS
from rosakit.files import atomic_write

START = 20.0
"""Seconds that a training of unknown length must at least have."""


class OutOfTimeError(Exception):
    """The deadline passed before the training ended."""


def fill(
    folder: Path, seconds: float, processes: int, device: str, seeds: int, small: bool
) -> None:
    """Run what of the plan fits into `seconds`; what is left running then is ended.

    Args:
        folder: of results and claims.
        processes: side by side; the GPUs are taken in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.claim"):  # of a call that was ended
        stale.unlink()
    deadline = time.monotonic() + seconds
    arguments = (folder, deadline - min(10.0, seconds / 10), device, seeds, small)
    if processes <= 1:
        worker(0, *arguments)
        return
    # One thread a process each: the work is on the GPU, and the cores are shared.
    os.environ.update({"OMP_NUM_THREADS": "1", "ROSAKIT_NUM_THREADS": "1"})
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(target=worker, args=(n, *arguments), daemon=True) for n in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.is_alive():
            process.kill()
            process.join(5)


def worker(
    number: int, folder: Path, deadline: float, device: str, seeds: int, small: bool
) -> None:
    """Take trainings until none is left that would end in time."""
    if device == "cuda":
        torch.set_num_threads(1)
        torch.cuda.set_device(number % torch.cuda.device_count())
    began = time.monotonic()

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise OutOfTimeError

    unknown = 0.0 if small else START
    runs = plan(device, small, seeds)
    for run in unclaimed(runs, folder, deadline, lambda run: took(folder, run, unknown)):
        try:
            seconds = train(run, folder, in_time)
        except OutOfTimeError:
            release(folder, run.name)
            return
        except Exception:
            # One training that fails must not take the others with it; it keeps its claim, so that
            # nobody repeats it, and is missing from the tables.
            print(f"{run.name} failed", traceback.format_exc(), flush=True)
            continue
        print(f"{time.monotonic() - began:6.0f} s {run.name} took {seconds:.0f} s", flush=True)


def train(run: Planned, folder: Path, in_time: Callable[[], None]) -> float:
    """One training; writes its row, returns its seconds."""
    function, arguments = run.job
    began = time.monotonic()
    row = function(**arguments, after_step=in_time)
    seconds = time.monotonic() - began
    content = {
        "part": run.part,
        "took": round(seconds, 2),
        "settings": plain({k: v for k, v in arguments.items() if k not in ("variant", "seed")}),
        "row": row,
    }
    atomic_write(folder / f"{run.name}.json", json.dumps(content) + "\n")
    return seconds


def took(folder: Path, run: Planned, unknown: float) -> float:
    """Seconds of the slowest finished seed of the same training, or `unknown`."""
    known = [json.loads(p.read_text())["took"] for p in folder.glob(f"{run.group}-s*.json")]
    return max(known, default=unknown)


def gather(folder: Path, out: Path, command: str) -> int:
    """Put the finished trainings into the results file; returns how many there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        found.setdefault(content["part"], []).append(content)
    order = list(VARIANTS)
    for part, contents in found.items():
        rows = [content["row"] for content in contents]
        rows.sort(key=lambda row: (order.index(row["variant"]), row["seed"]))
        names = {row["variant"] for row in rows}
        settings = {
            # What differs between the rows stands in the rows.
            **_common([content["settings"] for content in contents]),
            "variants": plain({n: VARIANTS[n] for n in order if n in names}),
        }
        results.add(out, part, command, settings, rows)
    return sum(map(len, found.values()))


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    first = settings[0]
    return {k: v for k, v in first.items() if all(s.get(k) == v for s in settings)}
