"""Time and memory of the fused estimators on one GPU, each checked against the dense form first.

    python -m benchmarks.estimators.fused --out docs/results/estimators_fused.json

Both engines in one run, the CUDA kernels first: a line a measurement, all of them with what they
were measured on as JSON, written as it goes. A form whose check fails is not timed; what does not
fit into `--seconds` is left out, and the file says so. Beside them: growth from 4096 to 16384
positions, and how close the soft forwards come to the hard one at the temperature that
docs/estimators/soft.md names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimators.timing import timed
from rosakit.evaluate.environment import describe_environment
from rosakit.files import atomic_write
from rosakit.ops import rosa
from rosakit.ops.triton import engine, pairwise

LIMIT = 1e-3  # relative error of y, dq, dk, dv against float64
REFERENCE: dict[str, Any] = {
    "what": "rosa_soft (2026-08), CUDA hard forward + dense backward, T = 4096, 512 routes, 4 bits",
    "milliseconds": 2007.0,
    "hardware": "NVIDIA H100 80GB, torch 2.11, 2026-11-22",
    "source": "quoted from the project's specification (its table of figures to beat), not "
    "measured in this run",
}
ENGINES = ("cuda", "triton")
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


def error(name: str, length: int = 304) -> float:
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

    def work() -> object:
        return gradients(inputs, **options)

    row: dict[str, Any] = {"estimator": name, "length": length, "routes": routes}
    row |= timed(work, work, repeats=repeats)
    if (length, routes) == (4096, 512):
        row["against_dense"] = round(REFERENCE["milliseconds"] / row["milliseconds"], 2)
    return row


def converged(name: str) -> list[dict[str, Any]]:
    """Largest difference of the soft forward from the hard one at tau = 1 / (20 (T + 1)).

    Recency separates all scores, so no stream has ties; outputs lie between -1 and 1. Inputs are
    at least a half away from the threshold of their bits, where at this temperature a value of
    less than `tau` would still be soft by itself, however sharp the match.
    """
    rows = []
    for length in (100, 250, 1000):
        q, k, v, *levels = example(length, 32)
        away = (x + torch.where(x > 0, 0.5, -0.5) for x in (q, k, v))
        inputs = (*away, *levels)
        hard = rosa(*inputs, bits=4)
        tau = 1 / (20 * (length + 1))
        row: dict[str, Any] = {"estimator": name, "length": length, "tau": tau}
        for kind, cast, fused in (
            ("dense_float64", torch.float64, False),
            ("fused_float32", torch.float32, True),
        ):
            tensors = (x.to(cast) for x in inputs)
            soft = rosa(*tensors, bits=4, estimator=name, tau=tau, fused=fused)
            row[kind] = float((soft.double() - hard).abs().max())
        rows.append(row)
    return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What four times the length costs, 4096 to 16384."""
    by = {(row["engine"], row["estimator"], row["length"]): row for row in rows}
    found = []
    for (engine_name, name, length), short in by.items():
        long = by.get((engine_name, name, 4 * length))
        if length == 4096 and long is not None:
            factors = {
                f"{key}_factor": round(long[key] / short[key], 2)
                for key in ("milliseconds", "peak_bytes")
            }
            found.append({"engine": engine_name, "estimator": name, **factors})
    return found


def use(name: str) -> None:
    """Let the kernels of one engine run from now on."""
    pairwise.engine_for = (lambda device: engine.TritonEngine()) if name == "triton" else _chosen


_chosen = pairwise.engine_for


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--routes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=[*ESTIMATORS])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the fused kernels are timed on a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.seconds
    content: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.estimators.fused", *sys.argv[1:]]),
        "environment": dataclasses.asdict(describe_environment()),
        "seed": 0,
        "reference": REFERENCE,
        "rows": [],
        "growth": [],
        "convergence": [],
        "left_out": [],
    }

    def write() -> None:
        content["growth"] = growth(content["rows"])
        if args.out:
            atomic_write(args.out, json.dumps(content, indent=1) + "\n")

    good = True
    for engine_name in args.engines:
        use(engine_name)
        for name in args.estimators:
            what = {"engine": engine_name, "estimator": name}
            try:
                good &= _measure_all(what, args, deadline, content, write)
            except Exception as failure:  # one form that fails must not take the others with it
                content["left_out"].append({**what, "why": str(failure)[:300]})
                print(what, failure, flush=True)
                torch.cuda.empty_cache()
                good = False
            write()
    use("cuda")
    return 0 if good else 1


def _measure_all(
    what: dict[str, Any],
    args: argparse.Namespace,
    deadline: float,
    content: dict[str, Any],
    write: Callable[[], None],
) -> bool:
    """Check one form, time it at every length; False where the check fails."""
    name = what["estimator"]
    if time.monotonic() > deadline:
        content["left_out"].append({**what, "why": "time"})
        return True
    off = error(name)
    if not off < LIMIT:
        content["left_out"].append({**what, "why": f"relative error {off:.1e} exceeds {LIMIT:g}"})
        print(content["left_out"][-1])
        return False
    if what["engine"] == "cuda" and name in ("soft_dp", "soft_scan"):
        content["convergence"] += converged(name)
    slowest = 0.0  # milliseconds a squared position
    for length in args.lengths:
        left = deadline - time.monotonic()
        expected = slowest * length**2 * 1e-3
        if left < 3 * expected:
            content["left_out"].append({**what, "length": length, "why": "time"})
            continue
        repeats = args.repeats if expected < 0.3 else 2
        row = {**what, **measure(name, length, args.routes, repeats), "error": off}
        slowest = row["milliseconds"] / length**2
        content["rows"].append(row)
        print(json.dumps(row), flush=True)
        write()
    return True


if __name__ == "__main__":
    sys.exit(main())
