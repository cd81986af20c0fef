"""How much of the matching on the CPU hides behind the GPU's work, with a timeline.

    python benchmarks/gpu/pipeline.py --out docs/results/pipeline.json
    python benchmarks/gpu/timeline.py docs/results/pipeline_trace.json

Shape of `run.py`: one row of 16384 positions, 512 routes of 4 bits, windowed attention of 16 heads,
an MLP of 6144, bfloat16. Wall-clock medians in milliseconds, each with a synchronisation at its
end. A match is hidden by the time that it and the work take one after the other minus what they
take together; `bound` is what work of that duration could hide at most.
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
from torch import Tensor, nn
from window import block_mask

import rosakit
import streams
from rosakit import native
from rosakit.files import atomic_write
from rosakit.ops import suffix_match
from rosakit.pipeline import Pipeline, Ticket
from rosakit.types import Match

ROUTES, BITS, SEED, WINDOW = 512, 4, 20261122, 2048


def median_ms(work: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median wall-clock time over `repeats` calls after two that are not counted."""
    times = []
    for i in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


class Block(nn.Module):
    """Windowed attention and an MLP, as a decoder layer has them."""

    def __init__(self, width: int, length: int, device: str) -> None:
        super().__init__()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.heads = max(1, width // 128)
        self.qkv = nn.Linear(width, 3 * width, **options)
        self.o = nn.Linear(width, width, **options)
        self.gate, self.up = (nn.Linear(width, 3 * width, **options) for _ in range(2))
        self.down = nn.Linear(3 * width, width, **options)
        self.inner = self._windowed(length) if device == "cuda" else self._plain

    @staticmethod
    def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def _windowed(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        mask = block_mask(length, WINDOW, "cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def attention(self, u: Tensor) -> Tensor:
        q, k, v = (
            x.view(*u.shape[:2], self.heads, -1).transpose(1, 2) for x in self.qkv(u).chunk(3, -1)
        )
        out: Tensor = self.o(self.inner(q, k, v).transpose(1, 2).reshape(u.shape))
        return out

    def forward(self, u: Tensor) -> Tensor:
        h = u + self.attention(u)
        out: Tensor = h + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return out


def measure(length: int, flips: int, threads: int, device: str) -> list[dict[str, Any]]:
    width = ROUTES * BITS if device == "cuda" else 128
    native.set_num_threads(threads)
    pipeline = Pipeline(device)
    block = Block(width, length, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    u = torch.randn(1, length, width, device=device, dtype=dtype)
    rows = []
    for family in ("random", "repeats"):
        q, k = streams.make(family, ROUTES, length, BITS, SEED, device)

        def submit(q: Tensor = q, k: Tensor = k) -> Ticket:
            return pipeline.submit(q, k, bits=BITS, counterfactual_bits=flips)

        def match(submit: Callable[[], Ticket] = submit) -> Match:
            return submit().result()

        sample = slice(0, 8)
        right = suffix_match(
            q[:, sample].cpu(), k[:, sample].cpu(), counterfactual_bits=flips, backend="cpu"
        )
        got = match()
        correct = all(
            torch.equal(mine[:, sample].cpu(), want)
            for mine, want in zip(got, right, strict=True)
            if mine is not None
        )
        alone = median_ms(match, device)
        block_ms = median_ms(lambda: block(u), device)
        enough = int(1.2 * alone / block_ms) + 1
        works: dict[str, tuple[int, Callable[[], object]]] = {
            "attention": (0, lambda: block.attention(u)),
            "attention and MLP": (1, lambda: block(u)),
            f"{enough} x (attention and MLP)": (
                enough,
                lambda enough=enough: [block(u) for _ in range(enough)],
            ),
        }
        for name, (blocks, work) in works.items():

            def beside(
                work: Callable[[], object] = work, submit: Callable[[], Ticket] = submit
            ) -> object:
                ticket = submit()
                kept = work()
                return kept, ticket.result()

            work_ms, both = median_ms(work, device), median_ms(beside, device)
            row = {
                "T": length,
                "flips": flips,
                "stream": family,
                "verified": correct,
                "threads": threads,
                "work": name,
                "blocks": blocks,
                "match_ms": alone,
                "work_ms": work_ms,
                "together_ms": both,
                "hidden_share": max(0.0, (alone + work_ms - both) / alone),
                "bound": min(1.0, work_ms / alone),
            }
            if not correct:
                row = {key: row[key] for key in ("T", "flips", "stream", "verified")}
            rows.append(row)
            print(row, flush=True)
        if family == "random":
            trace(beside, device, flips)
    pipeline.close()
    return rows


EVENTS: list[dict[str, Any]] = []


def trace(work: Callable[[], object], device: str, flips: int) -> None:
    """Profile one call; keep the spans of kernels, copies and of our own marks."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    config = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=kinds):  # what the profiler does once, before what is shown
        work()
    with profile(activities=kinds, experimental_config=config) as profiler:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    path = Path("/tmp/rosakit_trace.json")
    profiler.export_chrome_trace(str(path))
    for event in json.loads(path.read_text())["traceEvents"]:
        name, kind = str(event.get("name")), event.get("cat")
        own = name.startswith("rosakit::")
        if event.get("ph") == "X" and (own or kind in ("kernel", "gpu_memcpy")):
            if own and kind == "gpu_user_annotation":
                continue
            lane = f"stream {event['args'].get('stream')}" if not own else f"thread {event['tid']}"
            EVENTS.append(
                {
                    "flips": flips,
                    "name": name[:80],
                    "kind": kind,
                    "lane": lane,
                    "us": event["ts"],
                    "duration_us": event["dur"],
                }
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/pipeline.json"))
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--threads", type=int, nargs="+", default=[16])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    report: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"rosakit": rosakit.__version__, "torch": torch.__version__},
        "seed": SEED,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "rows": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for threads in arguments.threads:
            for flips in (0, BITS):
                EVENTS.clear() if flips == 0 else None
                report["rows"] += measure(arguments.length, flips, threads, arguments.device)
                atomic_write(arguments.out, json.dumps(report, indent=1) + "\n")
    first = min((e["us"] for e in EVENTS), default=0)
    for event in EVENTS:
        event["us"] -= first
    traced = arguments.out.with_name(arguments.out.stem + "_trace.json")
    atomic_write(traced, json.dumps(EVENTS, indent=0) + "\n")


if __name__ == "__main__":
    main()
