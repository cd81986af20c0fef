"""Decode latency and cache memory: full attention, a bare window, the window with rosakit.

    python benchmarks/decode.py --seconds 130 --out docs/results/decode.json    # one GPU
    python benchmarks/decode.py --tiny                                          # any machine

The model has the shape of Qwen3-1.7B with random weights in bfloat16; it decodes one row, eager,
as `generate` does. Latency is the median over single steps, each waited for, after a context that
chunked prefill has read. Hosts change their pace, to half of it and back within seconds, so the
steps of every variant are timed between two short turns of the window: the ratio to the window is
the median over the rounds of the ratio to its neighbours.

A check comes first: on a small float32 model, steps through the cache must give the logits of the
whole sequence. Memory is what the allocator holds for the cache, beside what
`rosakit.tuning.memory.cache_memory` says.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

import rosakit
from rosakit import native
from rosakit.files import atomic_write
from rosakit.layers.step import step
from rosakit.tuning import RosaConfig, attach, detach, inject, rosa_parameters
from rosakit.tuning.memory import cache_memory, plan_memory

SEED, WINDOW = 20261122, 2048
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
}
SEVEN = (0, 4, 8, 12, 16, 20, 24)
VARIANTS: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "window": {"adapters": False},
    "window + token route": {"adapters": False, "token_route": True},
    "window + 56 routes, 7 layers, GPU": {"routes": 56, "layers": SEVEN, "backend": "cuda"},
    "window + 56 routes, 7 layers, host": {"routes": 56, "layers": SEVEN, "backend": "cpu"},
    "window + 56 routes, GPU": {"routes": 56, "backend": "cuda"},
    "window + 56 routes, host": {"routes": 56, "backend": "cpu"},
    "window + 512 routes, 7 layers, GPU": {"routes": 512, "layers": SEVEN, "backend": "cuda"},
    "window + 512 routes, auto": {"routes": 512, "backend": "auto"},
    "window + 512 routes, host": {"routes": 512, "backend": "cpu"},
    "window + 56 routes, separate": {"routes": 56, "backend": "cuda"},
    "window + 512 routes, separate": {"routes": 512, "backend": "cuda"},
}
"""The default configuration has 512 routes in every layer of this shape, and leaves the choice to
"auto", which keeps them on the GPU at 32k."""

TWINS = {
    "window + 56 routes, 7 layers, host": "window + 56 routes, 7 layers, GPU",
    "window + 56 routes, host": "window + 56 routes, GPU",
    "window + 512 routes, host": "window + 512 routes, auto",
    "window + 56 routes, separate": "window + 56 routes, GPU",
    "window + 512 routes, separate": "window + 512 routes, auto",
}
"""Variants that differ in where their states lie, or how steps are launched, only."""

SEPARATE = ("window + 56 routes, separate", "window + 512 routes, separate")
"""Every adapter's step as separate operators (see `rosakit.layers.step`): what most other devices
and options do, and every GPU did before."""

SLOW = "window + 512 routes, host"
"""Read in 18 s, 15 GB of suffix state at 32k: left out unless asked for."""

SHORT = (
    "full attention",
    "window",
    "window + token route",
    "window + 56 routes, 7 layers, GPU",
    "window + 56 routes, GPU",
    "window + 512 routes, auto",
    *SEPARATE,
    "window + 56 routes, 7 layers, host",
    "window + 56 routes, host",
)
"""Variants at 32k."""

LONG = (
    "window",
    "window + 56 routes, GPU",
    "window + 512 routes, 7 layers, GPU",
    "window + 56 routes, 7 layers, GPU",
    "window + token route",
)
"""Variants at the longest context, in the order in which time is spent on them."""


def build(shape: dict[str, int], device: str, dtype: torch.dtype) -> Any:
    """A model with random weights."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    finally:
        torch.set_default_dtype(before)


def options_of(name: str, window: int, layers: int, on_gpu: bool) -> dict[str, Any]:
    """`RosaConfig` options of a variant, for a model with so many layers."""
    found = dict(VARIANTS[name] or {})
    if "layers" in found:
        found["layers"] = tuple(i for i in found["layers"] if i < layers)
    if not on_gpu:
        found.pop("backend", None)
    return {"window": window, "sink_tokens": 4, "adapter_dtype": "auto", **found}


def put_on(model: Any, name: str, window: int) -> None:
    """Attach a variant, its parameters away from their silent start."""
    inject.step = (lambda *_: None) if name in SEPARATE else step
    if VARIANTS[name] is None:
        return
    on_gpu = model.device.type == "cuda"
    options = options_of(name, window, model.config.num_hidden_layers, on_gpu)
    attach(model, RosaConfig(**options))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))


def take_off(model: Any, name: str) -> None:
    """Undo `put_on`."""
    inject.step = step
    if VARIANTS[name] is not None:
        detach(model)


def text(length: int, vocabulary: int) -> torch.Tensor:
    """Random tokens in which passages come back."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocabulary, (length,), generator=generator)
    for _ in range(length // 400):
        source, target = torch.randint(0, max(1, length - 100), (2,), generator=generator).tolist()
        if target > source + 100:
            ids[target : target + 100] = ids[source : source + 100]
    return ids[None]


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, chunk: int) -> Any:
    """The cache after reading `ids` in chunks."""
    cache = None
    for part in ids.split(chunk, dim=1):
        out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    return cache


@torch.inference_mode()
def check(device: str, names: list[str]) -> dict[str, float]:
    """Largest difference between steps through the cache and the whole sequence, small model."""
    found = {}
    ids = text(160, SMALL["vocab_size"]).to(device)
    stepped: dict[str, torch.Tensor] = {}
    for name in names:
        model = build(SMALL, device, torch.float32)
        put_on(model, name, 32)
        whole = model(ids, use_cache=False).logits
        cache, parts = None, []
        for part in ids.split([60, 67] + [1] * 33, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        stepped[name] = torch.cat(parts, 1)
        found[name] = float((stepped[name] - whole).abs().max())
        assert found[name] < 1e-3, f"{name}: the cache changes logits by {found[name]}"
        twin = stepped.get(TWINS.get(name, name), stepped[name])
        apart = float((stepped[name] - twin).abs().max())
        assert apart < 1e-3, f"{name}: its twin has other logits, by {apart}"
        take_off(model, name)
    return found


@torch.inference_mode()
def steps(model: Any, cache: Any, count: int, vocabulary: int) -> list[float]:
    """Milliseconds of single steps, each waited for."""
    ids = text(count, vocabulary).to(model.device)
    times = []
    for i in range(count):
        _wait(model.device)
        begin = time.perf_counter()
        logits = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        logits[:, -1].argmax(-1).item()  # greedy decoding waits for the token, too
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def measure(
    model: Any,
    names: list[str],
    context: int,
    window: int,
    chunk: int,
    count: int,
    rounds: int,
    until: float,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Latency and memory of each variant after `context` tokens.

    Args:
        until: no new variant or round begins after this `time.monotonic()`.
        keep: gets the rows each time that there is more to tell.
    """
    vocabulary = model.config.vocab_size
    ids = text(context, vocabulary).to(model.device)
    caches: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        if time.monotonic() > until:
            print(f"out of time before {name}", flush=True)
            break
        put_on(model, name, window)
        before = _allocated(model.device)
        begin = time.perf_counter()
        caches[name] = prefill(model, ids, chunk)
        _wait(model.device)
        rows[name] = {
            "variant": name,
            "context": context,
            "prefill_s": time.perf_counter() - begin,
            "cache_device_bytes": _allocated(model.device) - before,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if VARIANTS[name] is not None:
            parts = cache_memory(caches[name])
            rows[name]["cache_parts"] = parts.to_dict()
            options = options_of(
                name, window, model.config.num_hidden_layers, model.device.type == "cuda"
            )
            planned = plan_memory(model.config, RosaConfig(**options), context, dtype=model.dtype)
            rows[name]["planned_parts"] = planned.to_dict()
            rows[name]["cache_device_bytes_over_plain"] = round(parts.device / parts.plain, 4)
        take_off(model, name)
        print(json.dumps(rows[name]), flush=True)
        keep(list(rows.values()))
    base = "window" if "window" in rows else next(iter(rows), "")
    others = [name for name in rows if name != base] or [base]
    timed: dict[str, list[float]] = {name: [] for name in rows}
    shares: dict[str, list[float]] = {name: [] for name in rows}

    def turn(name: str) -> float:
        put_on(model, name, window)
        found = steps(model, caches[name], count, vocabulary)[count // 4 :]
        timed[name].append(statistics.median(found))
        take_off(model, name)
        return timed[name][-1]

    for _ in range(rounds):
        if not rows or time.monotonic() > until:
            break
        before = turn(base)
        for name in others:
            if time.monotonic() > until:
                break
            own = turn(name)
            after = turn(base)
            shares[name].append(2 * own / (before + after))
            print(name, context, f"{own:.2f} ms, {shares[name][-1]:.3f}", flush=True)
            before = after
            for changed in (base, name):
                rows[changed]["step_ms"] = statistics.median(timed[changed])
                rows[changed]["step_ms_rounds"] = [round(ms, 2) for ms in timed[changed]]
            if base == "window" and name != base:
                rows[name]["step_ms_over_window"] = round(statistics.median(shares[name]), 4)
                rows[name]["step_ms_over_window_rounds"] = [round(s, 3) for s in shares[name]]
            keep(list(rows.values()))
    return list(rows.values())


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's ratios to the window and to full attention."""
    for row in rows:
        peers = {r["variant"]: r for r in rows if r["context"] == row["context"]}
        for key in ("step_ms", "cache_device_bytes"):
            for other in ("window", "full attention"):
                base, ratio = peers.get(other, {}).get(key), f"{key}_over_{other.replace(' ', '_')}"
                measured = f"{ratio}_rounds" in row  # beside each other, which says more
                if base and key in row and not measured:
                    row[ratio] = round(row[key] / base, 4)


def commit() -> str:
    """The commit that is measured, if it is known."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def command(flags: list[str]) -> str:
    """The command with its flags, but for where its result went."""
    kept = [f for f, before in zip(flags, ["", *flags], strict=False) if "--out" not in (f, before)]
    return shlex.join(["python", "benchmarks/decode.py", *kept])


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small model and short contexts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns that variants take")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="these, at 32k only")
    parser.add_argument("--all", action="store_true", help=f"with {SLOW}, too")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    names = args.only or list(VARIANTS)
    on_gpu = args.device.startswith("cuda")
    shape = SMALL if args.tiny else SHAPE
    result: dict[str, Any] = {
        "what": "decode latency and cache memory, Qwen3-1.7B shape with random weights",
        "command": command(sys.argv[1:]),
        "date": dt.date.today().isoformat(),
        "commit": commit(),
        "seed": SEED,
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "core_threads": native.num_threads() if native.available() else 0,
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "shape": {**shape, "dtype": "float32" if args.tiny else "bfloat16", "batch": 1},
        "window": 32 if args.tiny else WINDOW,
        "largest_difference_from_the_whole_sequence": check(
            args.device, args.only or list(VARIANTS)
        ),
        "rows": [],
    }
    print(json.dumps(result["largest_difference_from_the_whole_sequence"]), flush=True)
    model = build(shape, args.device, torch.float32 if args.tiny else torch.bfloat16)
    chosen = args.only or ([*SHORT, SLOW] if args.all else list(SHORT))
    longest = [] if args.only else list(LONG)
    contexts, chunks = ((300, 600), (100, 100)) if args.tiny else ((32768, 131072), (4096, 8192))
    # A share of the time for the long context, whatever the short one takes.
    share = 0.45 if longest else 0.0
    limits = (until - share * min(args.seconds, 1e6), until)
    done: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        result["rows"] = [*done, *rows]
        compare(result["rows"])
        if args.out is not None:  # also what was measured before a machine is taken away
            atomic_write(args.out, json.dumps(result, indent=1) + "\n")

    for names, context, chunk, limit in zip(
        (chosen, longest), contexts, chunks, limits, strict=True
    ):
        done += measure(
            *(model, names, context, result["window"], chunk, args.steps, args.rounds),
            until=limit,
            keep=keep,
        )
        gc.collect()
    keep([])


if __name__ == "__main__":
    main()
