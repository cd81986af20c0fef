"""Time and memory of a training step: full attention, the window, the window with rosakit.

    python -m benchmarks.tuning --out docs/results/tuning.json       # one GPU, two minutes
    python -m benchmarks.tuning --tiny                               # any machine, seconds

The model has the shape of Qwen3-1.7B with random weights in bfloat16, one row of 16384 tokens,
window 2048 and 4 sinks, non-reentrant gradient checkpointing, the chunked loss of `rosakit tune`,
autocast to bfloat16. A step is forward, backward and AdamW. "everything" trains all parameters
(the second stage), "adapters" freezes the base; there the reference trains LoRA of rank 16, since a
frozen windowed model has nothing to train, and the others train LoRA as well.

Checks come first: on a small float32 model the device's loss and gradients must be those of the
CPU; at full size a fresh adapter must leave the windowed loss as it was. Variants run one after
the other on the same weights, the window at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import SEED, SHAPE, SMALL, build, text
from benchmarks.results import facts, merge
from rosakit.tuning import RosaConfig, attach, detach, is_attached, rosa_parameters
from rosakit.tuning.lora import add_lora, lora_parameters
from rosakit.tuning.loss import LossModel, find_head

WARM = 1
"""Steps that are not timed."""

VARIANTS: dict[str, dict[str, Any] | None] = {
    "window": {"adapters": False},
    "window + rosa": {},
    "window + rosa, a quarter of the positions credited": {"counterfactual_stride": 4},
    "window + rosa + token route": {"token_route": True},
    "window + rosa, whole projections": {"projection_rank": None},
    "full attention": None,
    "window again": {"adapters": False},
}
"""Name to `RosaConfig` options beside window and sinks; None leaves the model as it is."""


@contextmanager
def variant(model: Any, name: str, window: int) -> Iterator[None]:
    """The model with what a variant adds."""
    options = VARIANTS[name]
    if options is not None:
        torch.manual_seed(SEED)
        attach(model, RosaConfig(window=window, sink_tokens=4, **options))
    try:
        yield
    finally:
        if is_attached(model):
            detach(model)


def trained(model: Any, everything: bool) -> list[torch.nn.Parameter]:
    """Set and return what is trained."""
    wanted = set(map(id, model.parameters()))
    if not everything:
        wanted = set(map(id, lora_parameters(model).values()))
        if is_attached(model):
            wanted |= set(map(id, rosa_parameters(model).values()))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.grad = None
    return [p for p in model.parameters() if p.requires_grad]


def check(device: str) -> dict[str, float]:
    """Largest relative difference of a gradient between the device and the CPU, small model."""
    found = {}
    ids = text(300, SMALL["vocab_size"])
    for name in VARIANTS:
        grads = []
        # The same weights and the same noise on both.
        home = build(SMALL, "cpu", torch.float32)
        with variant(home, name, 64):
            torch.manual_seed(SEED)
            with torch.no_grad():
                for parameter in rosa_parameters(home).values() if is_attached(home) else ():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for place in ("cpu", device):
                model = copy.deepcopy(home).to(place).train()
                out = model(ids.to(place), labels=ids.to(place), use_cache=False)
                out.loss.backward()
                grads.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
        worst = max(
            float((a - b).norm() / b.norm().clamp(min=1e-6))
            for a, b in zip(grads[1], grads[0], strict=True)
        )
        found[name] = worst
        # A projection within rounding of zero may give another bit there, so not much less.
        assert worst < 0.1, f"{name}: gradients on {device} differ from the CPU's by {worst}"
    return found


@torch.no_grad()
def check_start(model: Any, window: int, ids: torch.Tensor) -> float:
    """The windowed loss, which fresh adapters leave as it is."""
    losses = []
    for name in ("window", "window + rosa"):
        head = find_head(model)
        with variant(model, name, window), torch.autocast(ids.device.type, dtype=torch.bfloat16):
            losses.append(float(LossModel(model, head)(ids, ids)["loss"]))
    assert losses[0] == losses[1], f"fresh adapters change the loss: {losses}"
    return losses[0]


def measure(
    model: Any, name: str, window: int, ids: torch.Tensor, *, everything: bool, steps: int
) -> dict[str, Any]:
    """Median step and peak memory of one variant."""
    device = ids.device
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    head = find_head(model)
    with variant(model, name, window):
        parameters = trained(model, everything)
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=cuda)
        loss_model = LossModel(model, head)
        model.train()
        times, losses = [], []
        for step in range(steps + WARM):
            _wait(device)
            if cuda and step == WARM:
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_model(ids, ids)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait(device)
            times.append(time.perf_counter() - begin)
            losses.append(float(loss.detach()))
        row = {
            "variant": name,
            "trains": "everything" if everything else "adapters",
            "step_ms": 1e3 * statistics.median(times[WARM:]),
            "step_ms_each": [round(1e3 * t, 1) for t in times[WARM:]],
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "first_loss": losses[0],
            "parameters_trained": sum(p.numel() for p in parameters),
            "tokens_per_s": ids.numel() / statistics.median(times[WARM:]),
        }
        for parameter in parameters:
            parameter.grad = None
    del optimizer, loss_model, parameters
    return row


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row against the window of its kind of training (the mean of its two turns)."""
    for row in rows:
        base = [
            r for r in rows if r["trains"] == row["trains"] and r["variant"].startswith("window")
        ]
        base = [r for r in base if r["variant"] in ("window", "window again")]
        if base:
            row["time_vs_window"] = row["step_ms"] / statistics.mean(r["step_ms"] for r in base)
            if row["peak_bytes"]:
                row["memory_vs_window"] = row["peak_bytes"] / base[0]["peak_bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file whose section 'training' is replaced")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], help="variants to leave out")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, window, shape = arguments.length, arguments.window, SHAPE
    if arguments.tiny:
        length, window, shape = 256, 32, SMALL
    section: dict[str, Any] = {
        **facts(),
        "length": length,
        "window": window,
        "shape": shape,
        "check": check(device),
        "rows": [],
    }
    print(json.dumps({"check": section["check"]}), flush=True)
    model = build(shape, device, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = text(length, shape["vocab_size"]).to(device)
    section["check_start"] = check_start(model, window, ids)
    for everything in (False, True):
        if not everything:
            add_lora(model, 16)
        else:
            model = build(shape, device, torch.bfloat16)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for name in VARIANTS:
            if name in arguments.skip:
                continue
            try:
                row = measure(
                    model, name, window, ids, everything=everything, steps=arguments.steps
                )
            except (RuntimeError, AssertionError) as error:
                row = {"variant": name, "trains": everything, "error": str(error)[:300]}
                print(json.dumps(row), flush=True)
                continue
            section["rows"].append(row)
            print(json.dumps(row), flush=True)
            if arguments.out is not None:
                section["rows"] = with_ratios(section["rows"])
                merge(arguments.out, "training", section)

    for row in with_ratios(section["rows"]):
        print(
            f"{row['trains']:10} {row['variant']:50} {row['step_ms']:9.1f} ms  "
            f"{row['time_vs_window']:.3f}x  {(row['peak_bytes'] or 0) / 2**30:6.2f} GiB  "
            f"{row.get('memory_vs_window', 0):.3f}x"
        )


if __name__ == "__main__":
    main()
