"""Time and memory of GPU work, for every benchmark of the estimators alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch


def timed(
    work: Callable[[], object],
    warm: Callable[[], object],
    *,
    repeats: int = 5,
    budget: float = math.inf,
) -> dict[str, Any]:
    """Milliseconds (median and range) and peak memory of `work`, after `warm`, which is not timed.

    Args:
        repeats: at most so many calls.
        budget: seconds after which no further call begins; one is always made.
    """
    warm()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) * 1e-3 < budget):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {
        "milliseconds": round(statistics.median(times), 3),
        "spread_milliseconds": [round(min(times), 3), round(max(times), 3)],
        "repeats": len(times),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }
