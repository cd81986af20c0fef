"""Time and memory of the GPU engine against windowed and full attention, in one run.

    python benchmarks/gpu/run.py --out docs/results/gpu.json      # about three minutes

Every case is checked against the C++ core before it is timed; a case that fails reports no time.
The file is written after every part. Times are medians of CUDA events in milliseconds, after a
warm-up. Shape: one batch row, 512 routes of 4 bits (a 2048-wide model), bfloat16; attention has 16
heads of 128 and 8 key/value heads.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from window import block_mask

import rosakit
import streams
from rosakit import cuda
from rosakit.files import atomic_write
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.ops import suffix_match
from rosakit.ops.oracle import suffix_match_oracle

ROUTES, BITS, SEED = 512, 4, 20261122
CHANNELS = ROUTES * BITS
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
TARGET_FAMILIES = ("random", "repeats", "constant")
TARGET_LENGTH = 16384
ATTENTION_LENGTHS = (16384, 131072, 4096, 65536)
# Measured on a machine of the same kind: the CPU pipeline of ROSA-Tuning with 16 threads (forward
# and flipped queries), and rosa_soft's hard forward in CUDA with the suffix cut at 32.
PUBLISHED = (
    ("ROSA-Tuning, CPU pipeline, 16 threads", 249.0, "counterfactual_ms", 16384),
    ("rosa_soft, CUDA hard forward, suffix <= 32", 38.2, "forward_ms", 8192),
)
LONG_ONLY_TARGETS = 16384  # beyond it, and below the last length, only the target families run


def commit() -> str:
    """The commit of this checkout, or "" outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or os.environ.get("ROSAKIT_COMMIT", "")


def median_ms(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `work` over `repeats` calls after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_bytes(work: Callable[[], object]) -> int:
    """Memory that `work` takes on top of what is allocated before it."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def verified(length: int, families: tuple[str, ...]) -> dict[str, bool]:
    """Per family whether one route of it equals the C++ core's answer."""
    pairs = [streams.make(name, 1, length, BITS, SEED) for name in families]
    q, k = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    expected = suffix_match(q.cpu(), k.cpu(), counterfactual_bits=BITS, backend="cpu")
    flipped = cuda.match(q, k, counterfactual_bits=BITS)
    plain = cuda.match(q, k)
    return {
        name: all(
            torch.equal(right[0, row], mine[0, row].cpu())
            for got in (flipped, plain)
            for right, mine in zip(expected, got, strict=True)
            if mine is not None and right is not None
        )
        for row, name in enumerate(families)
    }


def time_matching(report: dict[str, Any]) -> None:
    for length in LENGTHS:
        everything = length <= LONG_ONLY_TARGETS or length == LENGTHS[-1]
        families = streams.FAMILIES if everything else TARGET_FAMILIES
        correct = verified(length, families)
        for name in families:
            row: dict[str, Any] = {"T": length, "stream": name, "verified": correct[name]}
            if correct[name]:
                q, k = streams.make(name, ROUTES, length, BITS, SEED)
                slow = name == "noisy_constant"
                repeats = 1 if slow else 7
                row["forward_ms"] = median_ms(lambda q=q, k=k: cuda.match(q, k), repeats)
                if name in TARGET_FAMILIES or length <= 16384:
                    row["counterfactual_ms"] = median_ms(
                        lambda q=q, k=k: cuda.match(q, k, counterfactual_bits=BITS), repeats
                    )
                del q, k
            report["match"].append(row)
            print(row, flush=True)


def time_levels(report: dict[str, Any]) -> None:
    """What it gains to stop the levels where few candidates are left (`matcher.NEAR`)."""
    from rosakit.cuda import matcher

    for length in (TARGET_LENGTH, LENGTHS[-1]):
        for name in TARGET_FAMILIES:
            q, k = streams.make(name, ROUTES, length, BITS, SEED)
            times = {
                near: median_ms(lambda near=near, q=q, k=k: matcher.match(q, k, near=near))
                for near in (0, 1, matcher.NEAR, 6)
            }
            report["levels"].append({"T": length, "stream": name, "near_ms": times})
            print(report["levels"][-1], flush=True)


def time_runs(report: dict[str, Any]) -> None:
    """Run granularity, at the size of the target."""
    length = 16384
    for name in ("random", "repeats", "constant", "noisy_copy", "skewed"):
        q, k = streams.make(name, ROUTES, length, BITS, SEED)
        short = q[:, :2, :512].contiguous(), k[:, :2, :512].contiguous()
        options: dict[str, Any] = {"granularity": "run", "counterfactual_bits": BITS}
        expected = suffix_match_oracle(*(x.cpu() for x in short), **options)
        got = cuda.match(*short, **options)
        correct = all(
            torch.equal(mine.cpu(), right)
            for mine, right in zip(got, expected, strict=True)
            if mine is not None and right is not None
        )
        row: dict[str, Any] = {"T": length, "stream": name, "verified": correct}
        if correct:
            row["forward_ms"] = median_ms(
                lambda q=q, k=k: cuda.match(q, k, granularity="run"), repeats=3
            )
            row["counterfactual_ms"] = median_ms(
                lambda q=q, k=k, options=options: cuda.match(q, k, **options), repeats=3
            )
        report["runs"].append(row)
        print(row, flush=True)


def whole_step(length: int) -> dict[str, Any]:
    """Pack, match with counterfactuals, retrieve, and the whole backward pass, random channels."""
    generator = torch.Generator("cuda").manual_seed(SEED)

    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    q, k, v, grad = (real(1, length, CHANNELS) for _ in range(4))
    e0, e1 = real(CHANNELS), real(CHANNELS)
    packed = cuda.pack(q, BITS), cuda.pack(k, BITS)
    position, _, flipped = cuda.match(*packed, counterfactual_bits=BITS)

    def retrieve() -> Tensor:
        return cuda.retrieve_forward(v, position, e0, e1, None, BITS, "zero")

    def backward(deterministic: bool = False) -> object:
        return cuda.counterfactual_backward(
            grad,
            *(q, k, v, e0, e1, position, flipped),
            bits=BITS,
            deterministic=deterministic,
        )

    def forward_only() -> Tensor:
        found, _, _ = cuda.match(cuda.pack(q, BITS), cuda.pack(k, BITS))
        return cuda.retrieve_forward(v, found, e0, e1, None, BITS, "zero")

    def step() -> object:
        found, _, other = cuda.match(
            cuda.pack(q, BITS), cuda.pack(k, BITS), counterfactual_bits=BITS
        )
        y = cuda.retrieve_forward(v, found, e0, e1, None, BITS, "zero")
        gradients = cuda.counterfactual_backward(
            grad, q, k, v, e0, e1, found, other, bits=BITS, deterministic=False
        )
        return y, gradients

    return {
        "T": length,
        "pack_ms": median_ms(lambda: cuda.pack(q, BITS)),
        "retrieve_ms": median_ms(retrieve),
        "backward_ms": median_ms(backward),
        "backward_deterministic_ms": median_ms(lambda: backward(True)),
        "forward_ms": median_ms(forward_only),
        "forward_backward_ms": median_ms(step),
        "extra_bytes": peak_bytes(step),
        "qkv_bytes": 3 * q.numel() * q.element_size(),
    }


class AttentionLayer(nn.Module):
    """Projections and windowed attention of the adapter's width: 16 heads of 128, 8 for k and v."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        self.q = nn.Linear(CHANNELS, CHANNELS, **options)
        self.k, self.v = (nn.Linear(CHANNELS, CHANNELS // 2, **options) for _ in range(2))
        self.o = nn.Linear(CHANNELS, CHANNELS, **options)
        self.attend = attend

    def forward(self, u: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], -1, 128).transpose(1, 2)

        y = self.attend(heads(self.q(u)), heads(self.k(u)), heads(self.v(u)))
        out: Tensor = self.o(y.transpose(1, 2).reshape(u.shape))
        return out


def layer_bytes(
    module: nn.Module, forward: Callable[[Tensor], Tensor], length: int
) -> dict[str, int]:
    """What one layer keeps for its backward pass, and its peak over both passes."""
    u = torch.randn(1, length, CHANNELS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(u)

    def both() -> None:
        out = forward(u)
        out.backward(grad)

    both()  # allocates the gradients of weights and inputs, which are no activations
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward(u)
    kept = torch.cuda.memory_allocated() - before
    out.backward(grad)
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return {"kept_bytes": kept, "peak_bytes": peak}


def layer_memory(report: dict[str, Any], attend: Callable[..., Tensor], length: int) -> None:
    """A whole adapter layer beside a whole windowed attention layer of the same width."""
    adapter = RosaAdapter(CHANNELS, bits=BITS, rank=None, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        adapter.o_proj.weight.normal_(std=CHANNELS**-0.5)
    layer = AttentionLayer(attend)
    report["layer_memory"].append(
        {
            "T": length,
            "adapter": layer_bytes(adapter, lambda u: adapter(u, RosaContext()), length),
            "windowed_attention": layer_bytes(layer, layer, length),
        }
    )
    print(report["layer_memory"][-1], flush=True)


def time_attention(report: dict[str, Any], length: int, window: int = 2048) -> None:
    """Windowed and full attention; at the target's length whole layers, too."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    # One graph a length, with and without gradients: more than the default limit.
    torch._dynamo.config.recompile_limit = 4 * len(LENGTHS)
    compiled = torch.compile(flex_attention, dynamic=False)

    q = torch.randn(1, 16, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    grad = torch.randn_like(q)
    mask = block_mask(length, window, "cuda")

    def flex(q=q, k=k, v=v, mask=mask) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    def full(q=q, k=k, v=v) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both(attend: Callable[[], Tensor], q=q, k=k, v=v, grad=grad) -> object:
        return torch.autograd.grad(attend(), (q, k, v), grad)

    for name, attend in {"windowed": flex, "full": full}.items():
        repeats = 7 if name == "windowed" or length <= 32768 else 2
        with torch.no_grad():
            forward = median_ms(attend, repeats)
        row = {
            "T": length,
            "kind": name,
            "forward_ms": forward,
            "forward_backward_ms": median_ms(lambda attend=attend: both(attend), repeats),
            "extra_bytes": peak_bytes(lambda attend=attend: both(attend)),
        }
        report["attention"].append(row)
        print(row, flush=True)
    if length == TARGET_LENGTH:
        layer_memory(
            report,
            lambda q, k, v, mask=mask: compiled(q, k, v, block_mask=mask, enable_gqa=True),
            length,
        )


def compare(report: dict[str, Any]) -> None:
    """Ratios that the issue of speed is about, from this file's own rows."""

    def worst(field: str, length: int) -> float | None:
        times = [
            r[field]
            for r in report["match"]
            if r["T"] == length and r["stream"] in TARGET_FAMILIES and field in r
        ]
        return max(times) if times else None

    for name, published, field, length in PUBLISHED:
        ours = worst(field, length)
        if ours:
            row = {"published": name, "published_ms": published, "T": length, "worst_ms": ours}
            report["comparison"].append({**row, "times_faster": published / ours})
    for name in TARGET_FAMILIES:
        mine = [r for r in report["match"] if r["stream"] == name and "forward_ms" in r]
        times = {r["T"]: r["forward_ms"] for r in mine}
        if LENGTHS[-1] in times and TARGET_LENGTH in times:
            doubled = [n for n in LENGTHS[:-1] if n in times and 2 * n in times]
            growth = {f"{n // 1024}k": times[2 * n] / times[n] for n in doubled}
            long = times[LENGTHS[-1]] / times[TARGET_LENGTH]
            report["growth"].append({"stream": name, "128k_over_16k": long, "a_doubling": growth})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--skip-attention", action="store_true")
    arguments = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "hardware": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit(),
            "python": platform.python_version(),
        },
        "seed": SEED,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "shape": {"batch": 1, "routes": ROUTES, "bits": BITS, "dtype": "bfloat16"},
        "match": [],
        "runs": [],
        "levels": [],
        "step": [],
        "attention": [],
        "layer_memory": [],
        "comparison": [],
        "failures": [],
        "growth": [],
    }
    torch.manual_seed(SEED)

    started = time.perf_counter()

    def part(work: Callable[[], object]) -> None:
        """One part; a failure is written down, and costs the others nothing."""
        try:
            work()
        except Exception:
            report["failures"].append(traceback.format_exc())
            print(report["failures"][-1], flush=True)
        torch.cuda.empty_cache()
        report["seconds"] = round(time.perf_counter() - started, 1)
        atomic_write(arguments.out, (json.dumps(report, indent=1) + "\n").encode())

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    part(lambda: time_matching(report))
    part(lambda: compare(report))
    part(lambda: time_levels(report))
    for length in LENGTHS:
        part(lambda length=length: report["step"].append(whole_step(length)))
        print(report["step"][-1:], flush=True)
    for length in () if arguments.skip_attention else ATTENTION_LENGTHS:
        part(lambda length=length: time_attention(report, length))
    part(lambda: time_runs(report))


if __name__ == "__main__":
    main()
