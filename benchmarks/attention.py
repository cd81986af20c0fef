"""Windowed attention in its forms: time and memory of one layer, whole sequences on a GPU.

    python benchmarks/attention.py --out docs/results/attention.json

Shape of Qwen3-1.7B's attention: 16 heads of 128, 8 key and value heads, bfloat16, one row, window
2048 with 4 sinks. Each form is checked against the dense mask at 3000 tokens before it is timed;
times are medians of CUDA events after a warm-up. FlexAttention may fall back to an uncompiled form
that writes all scores out: at each length, the memory of a call must show that it did not.
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
from torch import Tensor, nn
from torch.nn import functional as F

import rosakit
from rosakit.files import atomic_write
from rosakit.tuning.attention_forms import Scores, block_mask, dense, eager, flexible
from rosakit.tuning.window import AttentionPlan, block_attention, positions, visible

HEADS, GROUPS, WIDTH, WINDOW, SINKS, SEED = 16, 8, 128, 2048, 4, 20261122


def states(length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v with gradients."""
    torch.manual_seed(SEED)
    made = (
        torch.randn(1, n, length, WIDTH, device=device, dtype=dtype)
        for n in (HEADS, GROUPS, GROUPS)
    )
    q, k, v = (x.requires_grad_() for x in made)
    return q, k, v


def forms(length: int, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name to a function of q, k and v; layouts and masks are made once, as in a model."""
    where = positions(length, None, torch.device(device))
    plan = AttentionPlan(where, lambda: where, lambda: where, plain=True, whole=True)
    blocks = plan.blocks(WINDOW, SINKS)
    mask = block_mask(where, where, WINDOW, SINKS)

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {
        "full attention": full,
        "blocks": lambda q, k, v: block_attention(q, k, v, blocks, attend),
        "blocks, eager": lambda q, k, v: block_attention(
            q, k, v, blocks, lambda *x: eager(*x, Scores())
        ),
        "flex": lambda q, k, v: flexible(q, k, v, mask, Scores()),
    }


def check(device: str) -> dict[str, float]:
    """Largest difference from the dense mask, outputs and gradients."""
    length = 3000
    q, k, v = states(length, device, torch.bfloat16)
    where = positions(length, None, torch.device(device))
    seen = visible(where, where, WINDOW, SINKS)[:, None]
    wanted = dense(nn.Module(), q, k, v, seen, Scores(), "eager")
    weight = torch.randn_like(wanted)
    exact = [wanted, *torch.autograd.grad((wanted * weight).sum(), (q, k, v))]
    found = {}
    for name, form in forms(length, device).items():
        if name == "full attention":
            continue
        out = form(q, k, v)
        got = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
        pairs = zip(got, exact, strict=True)
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        assert found[name] < 0.05, f"{name} differs by {found[name]}"
    return found


def median_ms(work: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds after two calls that do not count."""
    work(), work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def compiled(q: Tensor, k: Tensor, v: Tensor, form: Callable[..., Tensor]) -> dict[str, Any]:
    """Evidence that FlexAttention ran compiled: generated kernels, and no matrix of scores.

    Raises:
        RuntimeError: a call took as much memory as the scores of one head in four.
    """
    with torch.no_grad():
        form(q, k, v)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            form(q, k, v)
            torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    kernels = sorted({e.key for e in trace.key_averages() if e.key.startswith("triton")})
    scores = HEADS // 4 * q.shape[2] ** 2 * q.element_size()
    if taken >= scores:
        raise RuntimeError(
            f"FlexAttention took {taken} bytes at {q.shape[2]} tokens, expected less than "
            f"{scores}: it ran uncompiled (generated kernels seen: {kernels}); see what "
            "TORCH_LOGS=recompiles says"
        )
    return {"flex_call_bytes": taken, "flex_kernels": kernels}


def measure(length: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Forward, and forward with backward, of every form."""
    q, k, v = states(length, "cuda", torch.bfloat16)
    for name, form in forms(length, "cuda").items():

        def forward(form: Callable[..., Tensor] = form) -> None:
            with torch.no_grad():
                form(q, k, v)

        def both(form: Callable[..., Tensor] = form) -> None:
            torch.autograd.grad(form(q, k, v).sum(), (q, k, v))

        row: dict[str, Any] = {"form": name, "length": length, "forward_ms": median_ms(forward)}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row["forward_backward_ms"] = median_ms(both)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        if name == "flex":
            row |= compiled(q, k, v, form)
        print(json.dumps(row), flush=True)
        keep(row)
        torch.cuda.empty_cache()


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768])
    args = parser.parse_args()
    result: dict[str, Any] = {
        "what": "one layer of windowed attention, forms compared",
        "command": " ".join(["python benchmarks/attention.py --lengths", *map(str, args.lengths)]),
        "date": dt.date.today().isoformat(),
        "seed": SEED,
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "shape": {"heads": HEADS, "kv_heads": GROUPS, "head_dim": WIDTH, "window": WINDOW},
        "largest_relative_difference": check("cuda"),
        "rows": [],
    }

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        if args.out is not None:
            atomic_write(args.out, json.dumps(result, indent=1) + "\n")

    for length in args.lengths:
        measure(length, keep)


if __name__ == "__main__":
    main()
