"""RWKV-7's recurrence: flash-linear-attention's kernel and the chunked form against the loop.

    python -m benchmarks.wkv7 --json docs/results/rwkv8_wkv7.json

Errors are relative (norm of the difference over the norm) to the loop over positions in float64,
outputs, last state and the gradient of every input; times are the median of a forward and
backward pass on one GPU. Needs a GPU; the kernel's rows also need ``flash-linear-attention``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosakit.evaluate.environment import describe_environment
from rosakit.models.rwkv8 import wkv7

NAMES = ("r", "log_w", "k", "v", "a", "b", "state")
SHAPES = ((2, 129, 2, 16), (8, 1024, 12, 64))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def inputs(batch: int, length: int, heads: int, size: int) -> list[Tensor]:
    """Float64 tensors as RWKV-7's time mixing makes them: normalised keys, decay in its range."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v, key = (normal(batch, length, heads, size) for _ in range(4))
    key = torch.nn.functional.normalize(key, dim=-1)
    rate = normal(batch, length, heads, size).sigmoid()
    log_w = -torch.exp(torch.tensor(-0.5)) * normal(batch, length, heads, size).sigmoid()
    state = normal(batch, heads, size, size) / size**0.5
    return [x.double() for x in (r, log_w, k, v, -key, key * rate, state)]


def passes(backend: str, leaves: list[Tensor], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, last state and every gradient."""
    y, last = wkv7(*leaves, backend=backend)  # type: ignore[arg-type]
    loss = (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    return (y.detach(), last.detach(), *torch.autograd.grad(loss, leaves))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def seconds(backend: str, leaves: list[Tensor], weights: tuple[Tensor, ...]) -> float:
    times = []
    for n in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        passes(backend, leaves, weights)
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        if n > 2:
            times.append(begin.elapsed_time(end) / 1e3)  # type: ignore[no-untyped-call]
    return statistics.median(times)


def take_first_configurations() -> None:
    """Let the kernel's autotuned parts take their first configuration, before it is imported.

    Searching them compiles hundreds of kernels, minutes for one shape and dtype.
    """
    import triton

    search = triton.autotune

    def first(configs: list[Any], *args: Any, **options: Any) -> Any:
        return search(configs[:1], *args, **options)

    triton.autotune = first


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    kernel = importlib.util.find_spec("fla") is not None
    for shape in SHAPES[1:] if quick else SHAPES:
        exact = [x.cuda() for x in inputs(*shape)]
        weights = torch.randn_like(exact[3]), torch.randn_like(exact[6])
        for name, dtype in {"bfloat16": torch.bfloat16}.items() if quick else DTYPES.items():
            # The reference sees what the narrow dtype holds: only the arithmetic is compared.
            narrow = [
                x.to(dtype) if n != "state" else x.float()
                for n, x in zip(NAMES, exact, strict=True)
            ]
            wide = [x.double().requires_grad_() for x in narrow]
            expected = passes("reference", wide, weights)
            for backend in ("chunked", "fla") if kernel else ("chunked",):
                leaves = [x.clone().requires_grad_() for x in narrow]
                row: dict[str, Any] = {"shape": shape, "dtype": name, "backend": backend}
                try:
                    got = passes(backend, leaves, weights)
                    parts = ("y", "last", *(f"d{n}" for n in NAMES))
                    row["errors"] = {
                        part: float(f"{relative(a, b):.2e}")
                        for part, a, b in zip(parts, got, expected, strict=True)
                    }
                    row["milliseconds"] = round(1e3 * seconds(backend, leaves, weights), 3)
                except Exception as error:  # a kernel that refuses a dtype is a result as well
                    row["failed"] = f"{type(error).__name__}: {error}"[:400]
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="bfloat16 and the larger shape only, the kernel's first configurations",
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; this benchmark compares GPU kernels")
    if options.quick:
        take_first_configurations()
    found = []
    for row in rows(options.quick):
        found.append(row)
        worst = max(row["errors"].values()) if "errors" in row else row["failed"]
        print(
            row["shape"], row["dtype"], row["backend"], worst, row.get("milliseconds"), flush=True
        )
        if options.json is not None:
            versions = {}
            for package in ("fla-core", "triton"):
                try:
                    versions[package] = importlib.metadata.version(package)
                except importlib.metadata.PackageNotFoundError:
                    versions[package] = "missing"
            content = {
                "environment": dataclasses.asdict(describe_environment()),
                "versions": versions,
                "rows": found,
            }
            options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
