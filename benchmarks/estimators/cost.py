"""(e) Time and peak memory of every estimator, forward + backward, beside windowed attention.

    python -m benchmarks.estimators.cost --out docs/results/estimators_cost.json
    python -m benchmarks.estimators.cost --page --out docs/results/estimators_cost.json

One batch row of `--routes` routes of 4 bits in float32, through autograd, on one GPU. Each
estimator is first compared with its definition on a CPU in float64 (the oracle's matches, dense
matrices, every flipped stream matched again) at a small size; one that differs is not timed. There
samples come out of the sweep; one by one, as at great lengths, only tests compare them. A row
whose repetition would not fit into `--seconds` is measured with fewer routes, which the row says,
or left out. `--page` writes the table into docs/estimators/comparison.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.estimators import page
from benchmarks.estimators.timing import timed
from benchmarks.estimators.variants import VARIANTS, Variant
from rosakit.evaluate.environment import describe_environment
from rosakit.files import atomic_write
from rosakit.ops import rosa

LENGTHS = (512, 2048, 4096, 16384)
BITS = 4
LIMIT = 1e-3
"""Largest relative error of y, dq, dk and dv: float32 against float64."""
WINDOW = 2048
_PAIRWISE = ("soft_dp", "soft_scan", "suffix_attention")
_FLIPPED = 256
"""Flips of a sampled gradient whose number does not grow with the length."""

ROWS: dict[str, Variant] = {
    **{n: v for n, v in VARIANTS.items() if v.retrieve and n not in ("frozen", "bitflip_inverse")},
    f"bitflip_sampled, {_FLIPPED} flips": Variant("bitflip", note="of q and as many of k"),
    "suffix_attention, window 32": Variant("suffix_attention", {"window": 32}),
}


def options_of(name: str, length: int) -> dict[str, Any]:
    """Options of `rosa`; temperatures at the middle of their schedule."""
    variant = ROWS[name]
    options = variant.options | {n: s.at(1, 2) for n, s in variant.schedules.items()}
    if name.endswith("flips"):
        options["stride"] = max(2, 2 * length * BITS // _FLIPPED)  # at 1 nothing is sampled
    return {"bits": BITS, "estimator": variant.estimator, **options}


def inputs(length: int, routes: int, device: str) -> list[Tensor]:
    """q, k, v ``[1, T, C]`` and the levels; the same numbers on every device."""
    g = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 1, length, routes * BITS, generator=g).to(device)
    e1 = torch.ones(routes * BITS, device=device)
    return [q, k, v, -e1, e1]


def gradients(tensors: list[Tensor], slope: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """y, dq, dk, dv of ``<slope, y>``."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    y = rosa(*leaves, *tensors[3:], **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, slope)]


def error(name: str, device: str) -> float:
    """Largest relative error against the definition."""
    pairwise = ROWS[name].estimator in _PAIRWISE
    length = 300 if pairwise else 48
    mine = inputs(length, 4, device)
    slope = torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(1))
    options = options_of(name, length)
    torch.manual_seed(7)  # which flips are sampled
    got = gradients(mine, slope.to(device), options)
    exact = [x.cpu().double() for x in mine]
    torch.manual_seed(7)
    plain = {"fused": False} if pairwise else {}
    wanted = gradients(exact, slope.double(), {**options, **plain, "backend": "oracle"})
    return max(
        float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)
    )


def measure(name: str, length: int, routes: int, budget: float, expected: float) -> dict[str, Any]:
    """One row; warmed up with one route, which compiles kernels, and in full if that is short."""
    tensors, options = inputs(length, routes, "cuda"), options_of(name, length)
    slope = torch.ones_like(tensors[0])
    few = [x[..., :BITS].contiguous() for x in tensors]
    gradients(few, slope[..., :BITS].contiguous(), options)

    def work() -> None:
        gradients(tensors, slope, options)

    warm = work if expected < 3 else lambda: None
    return {
        "estimator": name,
        "length": length,
        "routes": routes,
        "options": {k: v for k, v in options.items() if k not in ("bits", "estimator")},
        **timed(work, warm, budget=budget),
    }


def attention(length: int, budget: float) -> list[dict[str, Any]]:
    """Windowed and full attention of the same width in bfloat16, as in `benchmarks.attention`."""
    from benchmarks.attention import forms, states

    q, k, v = states(length, "cuda", torch.bfloat16)
    found = forms(length, "cuda")
    rows = []
    for form, shown in (("flex", f"windowed attention, {WINDOW}"), ("full attention",) * 2):

        def work(form: str = form) -> None:
            y = found[form](q, k, v)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        print(f"{shown}: first call {time.perf_counter() - begin:.1f} s", flush=True)
        rows.append(
            {
                "estimator": shown,
                "length": length,
                "routes": None,
                **timed(work, work, budget=budget),
            }
        )
    return rows


def _measured(
    name: str, length: int, budget: float, rate: float, routes: int
) -> list[dict[str, Any]]:
    return [measure(name, length, routes, budget, rate * routes * length**2)]


def _attended(length: int, budget: float, _: int) -> list[dict[str, Any]]:
    return attention(length, budget)


def run(out: Path, seconds: float, lengths: list[int], routes: int, budget: float) -> int:
    """Measure until the seconds are used up; the file is written after every row."""
    deadline = time.monotonic() + seconds
    content: dict[str, Any] = {
        "what": "forward + backward of one batch row, routes of 4 bits, float32, through autograd",
        "command": " ".join(["python -m benchmarks.estimators.cost", *sys.argv[1:]]),
        "environment": dataclasses.asdict(describe_environment()),
        "checked": {},
        "rows": [],
        "left_out": [],
    }

    def write() -> None:
        atomic_write(out, json.dumps(content, indent=1) + "\n")

    for name in ROWS:
        try:
            content["checked"][name] = error(name, "cuda")
        except Exception as failure:  # one that fails must not take the others with it
            content["checked"][name] = None
            content["left_out"].append({"estimator": name, "why": f"its check failed: {failure}"})
        print(name, content["checked"][name], flush=True)
        write()
    good = [n for n, off in content["checked"].items() if off is not None and off < LIMIT]
    for name, off in content["checked"].items():
        if off is not None and name not in good:
            content["left_out"].append({"estimator": name, "why": f"off by {off:.1e}"})
    known: dict[str, float] = {}  # seconds a route and squared position
    for length in lengths:
        jobs: list[tuple[str, Callable[[int], list[dict[str, Any]]]]] = [
            (name, partial(_measured, name, length, budget, known.get(name, 0.0))) for name in good
        ]
        jobs.insert(0, ("attention", partial(_attended, length, budget)))
        for name, job in jobs:
            left = deadline - time.monotonic()
            # Half of what is left is for the rows to come.
            fitting = left / 2 / max(1e-30, known.get(name, 0.0) * length**2)
            some = routes
            while some > fitting and some > 1:
                some //= 2
            if left < 1:
                content["left_out"].append({"estimator": name, "length": length, "why": "time"})
                write()
                continue
            try:
                rows = job(some)
            except Exception as failure:
                content["left_out"].append(
                    {"estimator": name, "length": length, "why": str(failure)[:300]}
                )
                torch.cuda.empty_cache()
                write()
                continue
            content["rows"] += rows
            if name != "attention":
                known[name] = rows[0]["milliseconds"] * 1e-3 / (some * length**2)
            for row in rows:
                print(json.dumps(row), flush=True)
            write()
    return 0 if len(good) == len(ROWS) else 1


def table(content: dict[str, Any]) -> str:
    """Markdown: estimators down, lengths across; milliseconds and MiB."""
    rows = content["rows"]
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    full = max(row["routes"] or 0 for row in rows)
    cells = {(row["estimator"], row["length"]): row for row in rows}

    def cell(name: str, length: int) -> str:
        row = cells.get((name, length))
        if row is None:
            return "–"
        few = "" if row["routes"] in (None, full) else f" ({row['routes']} routes)"
        return f"{row['milliseconds']:,.2f} ms, {row['peak_bytes'] / 2**20:,.0f} MiB{few}"

    head = ["forward + backward", *(f"T = {length}" for length in lengths)]
    body = [
        [f"`{name}`" if name.partition(",")[0] in VARIANTS else name]
        + [cell(name, length) for length in lengths]
        for name in names
    ]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--routes", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repetitions a row")
    parser.add_argument("--page", action="store_true", help="write the table into the docs")
    args = parser.parse_args(arguments)
    if args.page:
        page.write(page.COMPARISON, {"cost": table(json.loads(args.out.read_text()))})
        return 0
    if not torch.cuda.is_available():
        print("costs are measured on a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    torch.set_num_threads(min(8, torch.get_num_threads()))
    return run(args.out, args.seconds, args.lengths, args.routes, args.budget)


if __name__ == "__main__":
    sys.exit(main())
