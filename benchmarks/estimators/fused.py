"""Time and memory of the fused estimators on one GPU, each checked against the dense form first.

    python benchmarks/estimators/fused.py --lengths 4096 16384 --out fused.json

Prints a line a measurement and writes all of them as JSON. A form whose check fails is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from rosakit.ops import rosa

LIMIT = 1e-3  # relative error of y, dq, dk, dv against float64
ESTIMATORS = ("soft_scan", "soft_dp", "suffix_attention")


def example(length: int, channels: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(seed)
    q, k, v = torch.randn(3, 1, length, channels, device="cuda", generator=g)
    e1 = torch.ones(channels, device="cuda")
    return q, k, v, -e1, e1


def gradients(inputs: tuple[torch.Tensor, ...], **options: object) -> tuple[torch.Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    y = rosa(*leaves, *inputs[3:], bits=4, **options)
    return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))


def error(estimator: str, length: int = 300) -> float:
    inputs = example(length, 16)
    got = gradients(inputs, estimator=estimator, fused=True)
    exact = tuple(x.double() for x in inputs)
    expected = gradients(exact, estimator=estimator, fused=False)
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)
    )


def measure(estimator: str, length: int, routes: int, repeats: int) -> dict[str, object]:
    inputs = example(length, routes * 4)
    gradients(inputs, estimator=estimator)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        gradients(inputs, estimator=estimator)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {
        "estimator": estimator,
        "length": length,
        "routes": routes,
        "milliseconds": statistics.median(times),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--routes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("the fused kernels are timed on a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    rows: list[dict[str, object]] = []
    for estimator in ESTIMATORS:
        off = error(estimator)
        if not off < LIMIT:
            print(f"{estimator}: relative error {off:.1e} exceeds {LIMIT:g}, not timed")
            continue
        for length in args.lengths:
            row = {**measure(estimator, length, args.routes, args.repeats), "error": off}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        device = torch.cuda.get_device_name()
        args.out.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")
    return 0 if len(rows) == len(ESTIMATORS) * len(args.lengths) else 1


if __name__ == "__main__":
    sys.exit(main())
