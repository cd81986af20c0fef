"""Every single-bit flip: time of the CPU core's and the GPU's sweep, and that they agree.

    python -m benchmarks.estimators.bitflip --json docs/results/bitflip.json

The credit of all flips of one call (packing and transfers included), median of some calls. Streams
are noisy copies of earlier passages. Where the core can do it in seconds, the GPU's float32 result
is compared with it: equal to the last bit, or no time is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rosakit import cuda, native
from rosakit.evaluate.environment import describe_environment
from rosakit.ops.estimators.bitflip_credit import credit_core, credit_gpu
from rosakit.ops.estimators.registry import MatchOptions

# (what, batch, routes, bits, length, tied)
CASES = (
    ("counting demo, a step's layer", 128, 64, 1, 127, "qkv"),
    ("4 bits, 127 positions", 128, 16, 4, 127, "qkv"),
    ("QKV layer, 1 bit", 128, 128, 1, 128, "none"),
    ("2048 channels, 1k", 1, 512, 4, 1024, "none"),
    ("2048 channels, 4k", 1, 512, 4, 4096, "none"),
    ("2048 channels, 4k, one stream", 1, 512, 4, 4096, "qkv"),
    ("2048 channels, 16k", 1, 512, 4, 16384, "none"),
)
_COMPARED = 1 << 31  # pairs of positions that the core sweeps in seconds


def inputs(batch: int, routes: int, bits: int, length: int) -> list[Tensor]:
    """Gradient, q, k, v and levels."""
    g = torch.Generator().manual_seed(length)
    passage = torch.randn(batch, length // 3 + 1, routes * bits, generator=g)
    k = passage.repeat(1, 3, 1)[:, :length].contiguous()
    q, v = (torch.where(torch.rand(k.shape, generator=g) < 0.03, -k, k) for _ in range(2))
    grad = torch.randn(k.shape, generator=g)
    levels = torch.randn(2, routes * bits, generator=g)
    return [grad, q, k, v, *levels]


def rows(longest: int) -> Iterator[dict[str, Any]]:
    for name, batch, routes, bits, length, tied in CASES:
        if length > longest:
            continue
        grad, q, k, v, e0, e1 = inputs(batch, routes, bits, length)
        if tied != "none":
            q = v = k
        tensors = (grad, q, k, v, e0, e1, None)
        options: dict[str, Any] = {
            "bits": bits,
            "match": MatchOptions(),
            "unmatched": "zero",
            "tied": tied,
        }
        row: dict[str, Any] = {
            "case": name,
            "shape": [batch, routes, bits, length],
            "tied": tied,
            "flips": batch * routes * bits * length * (1 if tied != "none" else 2),
        }
        expected = None
        if batch * routes * length**2 // 2 <= _COMPARED:
            begin = time.perf_counter()
            expected = credit_core(*tensors, **options)
            row["core_ms"] = round(1e3 * (time.perf_counter() - begin), 2)
        if cuda.available():
            on_gpu = tuple(None if x is None else x.cuda() for x in tensors)
            got = credit_gpu(*on_gpu, **options)
            if expected is not None:
                same = all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
                row["check"] = "equal" if same else "DIFFERS"
                if not same:
                    yield row
                    continue
            times = []
            for _ in range(5 if length < 10000 else 2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                credit_gpu(*on_gpu, **options)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - begin))
            row["gpu_ms"] = round(statistics.median(times), 3)
            row["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            torch.cuda.reset_peak_memory_stats()
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--longest", type=int, default=16384, help="leave longer streams out")
    options = parser.parse_args()
    found = []
    for row in rows(options.longest):
        found.append(row)
        print(row, flush=True)
        if options.json is not None:
            content = {
                "environment": dataclasses.asdict(describe_environment()),
                "core_threads": native.num_threads(),
                "rows": found,
            }
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    if any(row.get("check") == "DIFFERS" for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
