"""Time and memory of the fused estimators on one GPU, each checked against the dense form first.

    python -m benchmarks.estimators.fused --out docs/results/estimators_fused.json

Prints a line a measurement and writes all of them, with what they were measured on, as JSON. A form
whose check fails is not timed. `--engine triton` measures the Triton kernels instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from rosakit.evaluate.environment import describe_environment
from rosakit.files import atomic_write
from rosakit.ops import rosa
from rosakit.ops.triton import engine, pairwise

LIMIT = 1e-3  # relative error of y, dq, dk, dv against float64
DENSE_MILLISECONDS = 2007.0
"""rosa_soft's dense backward with its forward: 512 routes of 4 bits, T = 4096, one H100."""
ESTIMATORS: dict[str, dict[str, Any]] = {
    "soft_scan": {},
    "soft_dp": {},
    "suffix_attention": {},
    "suffix_attention, window 32": {"window": 32},
}


def example(length: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v = torch.randn(3, 1, length, channels, device="cuda", generator=g)
    e1 = torch.ones(channels, device="cuda")
    return q, k, v, -e1, e1


def gradients(inputs: tuple[torch.Tensor, ...], **options: object) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    y = rosa(*leaves, *inputs[3:], bits=4, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))


def options_of(name: str) -> dict[str, Any]:
    return {"estimator": name.partition(",")[0], **ESTIMATORS[name]}


def error(name: str, length: int = 300) -> float:
    """Largest relative error of outputs and gradients against the dense form in float64."""
    inputs = example(length, 16)
    got = gradients(inputs, **options_of(name), fused=True)
    exact = tuple(x.double() for x in inputs)
    expected = gradients(exact, **options_of(name), fused=False)
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)
    )


def measure(name: str, length: int, routes: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of forward + backward through autograd, and peak memory."""
    inputs = example(length, routes * 4)
    options = options_of(name)
    gradients(inputs, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        gradients(inputs, **options)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    row = {
        "estimator": name,
        "length": length,
        "routes": routes,
        "milliseconds": round(statistics.median(times), 3),
        "spread_milliseconds": [round(min(times), 3), round(max(times), 3)],
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }
    if (length, routes) == (4096, 512):
        row["against_dense"] = round(DENSE_MILLISECONDS / row["milliseconds"], 2)
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--routes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=[*ESTIMATORS])
    parser.add_argument("--engine", choices=["cuda", "triton"], default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the fused kernels are timed on a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    if args.engine == "triton":
        pairwise.engine_for = lambda device: engine.TritonEngine()
    rows: list[dict[str, Any]] = []
    for name in args.estimators:
        off = error(name)
        if not off < LIMIT:
            print(f"{name}: relative error {off:.1e} exceeds {LIMIT:g}, not timed")
            continue
        for length in args.lengths:
            if "window" in ESTIMATORS[name] and length > 4096:
                continue  # block by block: seconds, and linear like the others
            repeats = args.repeats if length <= 4096 and not ESTIMATORS[name] else 2
            row = {**measure(name, length, args.routes, repeats), "error": off}
            row["engine"] = args.engine
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                _write(args.out, rows)
    return 0 if {row["estimator"] for row in rows} == set(args.estimators) else 1


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    content = {
        "command": "python -m benchmarks.estimators.fused",
        "environment": dataclasses.asdict(describe_environment()),
        "seed": 0,
        "dense_milliseconds": DENSE_MILLISECONDS,
        "rows": rows,
    }
    atomic_write(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
