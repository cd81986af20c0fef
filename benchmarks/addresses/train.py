"""Train and measure one variant; see `benchmarks.addresses`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.addresses.variants import VARIANTS, rosa_fields
from rosakit.evaluate import perplexity
from rosakit.files import atomic_write
from rosakit.symbols import pack
from rosakit.tuning import RosaConfig, adapters_of, attach, record_matches
from rosakit.tuning.health import match_health, symbol_health
from rosakit.tuning.loss import LossModel, find_head
from rosakit.tuning.result import set_trainable
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.teaching import AddressTeacher
from rosakit.tuning.trainer import parameter_groups


def train_variant(
    model: Any,
    blocks: dict[str, Any],
    name: str,
    *,
    seed: int,
    tokens: int,
    batch: int,
    lr: float,
    layers: tuple[int, ...],
    window: int,
    seconds: float,
    output: Path,
) -> None:
    """Train one variant of a plain, frozen model and write its measurements as JSON.

    Args:
        blocks: token blocks ``train [N, T]`` and ``heldout [M, T]``.
        tokens: training tokens.
        batch: rows a step.
        lr: peak rate of values, outputs and levels.
        seconds: training that takes longer ends here, its rates falling by time; the result
            says so.
    """
    torch.manual_seed(seed)
    rosa = RosaConfig(**rosa_fields(name, layers, window))
    config = TuneConfig(rosa=rosa, lr=lr, seed=seed, **VARIANTS[name].tune)
    length = blocks["train"].shape[1]
    device = next(model.parameters()).device
    head = find_head(model)
    attach(model, rosa)
    set_trainable(model)
    teacher = None
    if config.address_loss != "none":
        teacher = AddressTeacher(config.address_loss, config.address_samples)
    wrapped = LossModel(model, head, teacher=teacher, teacher_weight=config.address_weight)
    result: dict[str, Any] = {"variant": name, "seed": seed, "what": VARIANTS[name].what}
    result["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result["before"] = measure_health(model, blocks["heldout"][:4], device)

    steps = max(1, tokens // (batch * length))
    order = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.99))
    warmup = max(1, round(0.05 * steps))
    began = time.time()

    def rate(done: int) -> float:
        share = min(1.0, max(done / steps, (time.time() - began) / seconds))
        return min((done + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * share))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses: list[Tensor] = []
    log: list[dict[str, float]] = []
    step = 0
    for step in range(1, steps + 1):
        rows = order[torch.arange((step - 1) * batch, step * batch) % len(order)]
        ids = blocks["train"][rows].to(device, torch.int64)
        wrapped.observe = step % max(1, steps // 8) == 0
        loss = wrapped(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
        if wrapped.observe:
            log.append({"step": step, "loss": float(loss.detach())} | wrapped.health)
            print(f"{name} {seed} {step}/{steps} {time.time() - began:.0f}s {log[-1]}", flush=True)
        if time.time() - began > seconds:
            break
    taken = time.time() - began
    result |= {
        "steps": step,
        "planned_steps": steps,
        "tokens": step * batch * length,
        "tokens_a_second": round(step * batch * length / taken),
        "log": log,
        "loss": float(torch.stack(losses[-max(1, step // 10) :]).mean()),
        "after": measure_health(model, blocks["heldout"][:4], device),
    }
    result["heldout"] = measure_perplexity(model, blocks["heldout"])
    print(f"{name} {seed} done {result['heldout']}", flush=True)
    atomic_write(output, json.dumps(result, indent=1) + "\n")


def measure_perplexity(model: Any, rows: Tensor) -> dict[str, float]:
    """Held-out nats a token at positions 0–256, 256–1k and from 1k on."""
    length = rows.shape[1]
    edges = [e for e in (0, 256, 1024, 4096) if e < length]
    with torch.no_grad():
        found = perplexity(model, list(rows.to(torch.int64)), edges=edges)
    return {f"{b.start}-{b.stop}": b.nll / b.tokens for b in found.buckets}


def measure_health(model: Any, rows: Tensor, device: torch.device) -> dict[str, Any]:
    """What each layer's matches point at on held-out text, and the entropy of its symbols."""
    if not any(adapter.retrieve for adapter in adapters_of(model).values()):
        return {}
    adapters = adapters_of(model)
    config = next(iter(adapters.values()))
    sums: dict[int, list[dict[str, float]]] = {}
    with torch.no_grad(), record_matches(model, keep_inputs=True) as contexts:
        for row in rows:
            ids = row[None].to(device, torch.int64)
            contexts.clear()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            context = contexts[-1]
            for index, match in context.matches.items():
                values = match_health(match, ids, window=256)
                if index in context.inputs:
                    q, _ = adapters[index].addresses(context.inputs[index], context)
                    values |= symbol_health(pack(q, config.bits), config.bits)
                sums.setdefault(index, []).append(values)
    return {
        str(index): {n: sum(r.get(n, 0.0) for r in rows) / len(rows) for n in rows[0]}
        for index, rows in sums.items()
    }
