"""One decoding step of all routes: the GPU's streaming state beside the CPU's, by context length.

    python benchmarks/gpu/decode.py --out docs/results/gpu_decode.json

512 routes of 4 bits, one row. A step starts and ends with tensors on the GPU: the CPU's time
holds both copies. Wall-clock medians in microseconds over single steps, each waited for; the GPU's
is also given without the wait, over a queue of steps. `crossover` is where the two lines meet.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rosakit
import streams
from rosakit import native
from rosakit.cuda.stream import StreamMemory
from rosakit.files import atomic_write

ROUTES, BITS, SEED = 512, 4, 20261122
LENGTHS = (1024, 4096, 16384, 32768, 65536)
FAMILIES = ("random", "repeats")
STEPS = 24


def median_us(step: Callable[[int], object]) -> float:
    """Median wall-clock time of `STEPS` steps, each waited for, after four."""
    times = []
    for i in range(4 + STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(i)
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(times[4:])


def queued_us(step: Callable[[int], object]) -> float:
    """Time a step of many that are queued one behind the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(STEPS):
        step(i)
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / STEPS


def measure(family: str, length: int) -> dict[str, Any]:
    total = length + 4 + 3 * STEPS
    q, k = streams.make(family, ROUTES, total, BITS, SEED)
    gpu = StreamMemory(1, ROUTES, bits=BITS)
    gpu.extend(q[..., :length], k[..., :length])
    fork = gpu.fork()
    cpu = native.SuffixMemory(1, ROUTES, bits=BITS)
    cpu.extend(q[..., :length].cpu().contiguous(), k[..., :length].cpu().contiguous())
    same = []

    def column(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = length + i
        return q[..., at : at + 1], k[..., at : at + 1]

    def on_gpu(i: int) -> object:
        return gpu.extend(*column(i))

    def on_cpu(i: int) -> object:
        found = cpu.extend(*(x.cpu().contiguous() for x in column(i)))
        position = found.position.to("cuda", non_blocking=True)
        same.append(position)
        return position

    cpu_us = median_us(on_cpu)
    right = list(same)
    same.clear()
    found = [gpu.extend(*column(i)).position for i in range(len(right))]
    gpu = fork
    row: dict[str, Any] = {
        "context": length,
        "stream": family,
        "verified": all(torch.equal(a, b) for a, b in zip(found, right, strict=True)),
    }
    if row["verified"]:
        row |= {
            "cpu_us": cpu_us,
            "gpu_us": median_us(on_gpu),
            "gpu_queued_us": queued_us(on_gpu),
            "cpu_bytes_a_symbol": cpu.nbytes / (ROUTES * length),
            "gpu_bytes_a_symbol": gpu.nbytes / (ROUTES * length),
        }
    return row


def crossover(rows: list[dict[str, Any]]) -> int | None:
    """The shortest measured context at which the CPU is faster on every stream, or None."""
    for length in LENGTHS:
        timed = [r for r in rows if r["context"] == length and "cpu_us" in r]
        if timed and all(r["cpu_us"] < r["gpu_us"] for r in timed):
            return length
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu_decode.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python benchmarks/gpu/decode.py",
        "hardware": torch.cuda.get_device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": native.num_threads(),
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seed": SEED,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rows": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for length in LENGTHS:
        for family in FAMILIES if length < LENGTHS[-1] else FAMILIES[:1]:
            report["rows"].append(measure(family, length))
            print(report["rows"][-1], flush=True)
            report["crossover"] = crossover(report["rows"])
            atomic_write(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
