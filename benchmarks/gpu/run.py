"""Time and memory of the GPU engine against windowed and full attention, in one run.

    python benchmarks/gpu/run.py --out docs/results/gpu.json

Every case is checked against a second method before it is timed; a case that fails reports no
time. Times are medians of CUDA events in milliseconds, after a warm-up. Shape: one batch row, 512
routes of 4 bits (a 2048-wide model), bfloat16; attention has 16 heads of 128 and 8 key/value heads.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import verify
from torch import Tensor

import rosakit
import streams
from rosakit import cuda
from rosakit.ops.oracle import suffix_match_oracle

ROUTES, BITS, SEED = 512, 4, 20261122
CHANNELS = ROUTES * BITS
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
TARGET_FAMILIES = ("random", "repeats", "constant")
LONG_ONLY_TARGETS = 16384  # beyond it, and below the last length, only the target families run


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
    """Per family whether one route of it equals the row-by-row method."""
    flips = BITS if length <= 16384 else 0
    pairs = [streams.make(name, 1, length, BITS, SEED) for name in families]
    q, k = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    expected = verify.match_by_rows(q[0], k[0], flips)
    got = cuda.match(q, k, counterfactual_bits=flips)
    return {
        name: all(
            torch.equal(right[row], mine[0, row])
            for right, mine in zip(expected, got, strict=True)
            if mine is not None
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
                if not slow or length <= 16384:
                    row["counterfactual_ms"] = median_ms(
                        lambda q=q, k=k: cuda.match(q, k, counterfactual_bits=BITS), repeats
                    )
                del q, k
            report["match"].append(row)
            print(row, flush=True)


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


def time_attention(report: dict[str, Any], window: int = 2048) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    # One graph a length, with and without gradients: more than the default limit.
    torch._dynamo.config.recompile_limit = 4 * len(LENGTHS)
    compiled = torch.compile(flex_attention, dynamic=False)

    def windowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    for length in LENGTHS[1:]:
        q = torch.randn(1, 16, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (
            torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        grad = torch.randn_like(q)
        mask = create_block_mask(windowed, None, None, length, length, device="cuda", _compile=True)

        def flex(q=q, k=k, v=v, mask=mask) -> Tensor:
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)

        def full(q=q, k=k, v=v) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def both(attend: Callable[[], Tensor], q=q, k=k, v=v, grad=grad) -> object:
            return torch.autograd.grad(attend(), (q, k, v), grad)

        kinds = {"windowed": flex} if length > 65536 else {"windowed": flex, "full": full}
        for name, attend in kinds.items():
            with torch.no_grad():
                forward = median_ms(attend)
            row = {
                "T": length,
                "kind": name,
                "forward_ms": forward,
                "forward_backward_ms": median_ms(lambda attend=attend: both(attend)),
                "extra_bytes": peak_bytes(lambda attend=attend: both(attend)),
            }
            report["attention"].append(row)
            print(row, flush=True)


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
            "python": platform.python_version(),
        },
        "seed": SEED,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "shape": {"batch": 1, "routes": ROUTES, "bits": BITS, "dtype": "bfloat16"},
        "match": [],
        "runs": [],
        "step": [],
        "attention": [],
    }
    torch.manual_seed(SEED)

    def save() -> None:  # after every part, so that a failure loses one part only
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    time_matching(report)
    time_runs(report)
    save()
    for length in LENGTHS:
        report["step"].append(whole_step(length))
        print(report["step"][-1], flush=True)
        torch.cuda.empty_cache()
    save()
    if not arguments.skip_attention:
        time_attention(report)
        save()


if __name__ == "__main__":
    main()
