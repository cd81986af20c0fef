"""Runs side by side: small models leave a GPU mostly idle, so several share it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Job = tuple[Callable[..., dict[str, Any]], dict[str, Any]]
"""A function that other processes can import, and its arguments."""


def results(jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    """What each job returns, in the order in which they finish.

    A job that fails gives ``{"error": ..., **its plain arguments}``, so that the others go on.
    """
    if workers <= 1:
        for job in jobs:
            yield _guarded(*job)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_prepare_worker
    ) as pool:
        waiting = {}
        for job in jobs:
            waiting[pool.submit(_guarded, *job)] = job
        for done in concurrent.futures.as_completed(waiting):
            failure = done.exception()  # a worker that died
            yield done.result() if failure is None else _failed(waiting[done][1], str(failure))


def _prepare_worker() -> None:
    """One thread each, and the GPUs in turn."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        number = multiprocessing.current_process()._identity[0]  # type: ignore[attr-defined]
        torch.cuda.set_device(number % torch.cuda.device_count())


def _guarded(function: Callable[..., dict[str, Any]], arguments: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        return function(**arguments)
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return _failed(arguments, f"{error} after {time.perf_counter() - begin:.0f} s")


def _failed(arguments: dict[str, Any], error: str) -> dict[str, Any]:
    plain = {k: v for k, v in arguments.items() if isinstance(v, str | int | float | bool)}
    return {**plain, "error": error}
