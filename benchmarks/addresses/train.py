"""Train and measure one variant; see `benchmarks.addresses`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.addresses.misread import misread
from benchmarks.addresses.rule import write_rule
from benchmarks.addresses.variants import VARIANTS, rosa_fields
from rosakit.files import atomic_write
from rosakit.tuning import RosaConfig, adapters_of, attach, record_matches
from rosakit.tuning.health import layer_health
from rosakit.tuning.loss import Head, LossModel, log_probs_of
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.result import set_trainable
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.stages import parameter_groups
from rosakit.tuning.teaching import AddressTeacher

EDGES = (0, 256, 1024, 4096)


class Plan(NamedTuple):
    """What all variants share.

    Attributes:
        tokens: training tokens.
        batch: rows a step.
        lr: peak rate of values, outputs and levels.
        layers: layers with an adapter.
        window: of attention, in tokens.
        sinks: tokens that stay visible.
        backend: who matches.
    """

    tokens: int
    batch: int
    lr: float
    layers: tuple[int, ...]
    window: int
    sinks: int
    backend: Literal["auto", "cpu"]


Reads = dict[tuple[int, int], Tensor]


class Text(NamedTuple):
    """Token ids ``[N, T]``, and who tells the model what enters its lowest layer for a row."""

    ids: Tensor
    give: Callable[[Tensor], None]


def train_variant(
    model: Any, train: Text, heldout: Text, name: str, seed: int, plan: Plan, output: Path
) -> None:
    """Train one variant of a plain, frozen model and write its measurements as JSON."""
    torch.manual_seed(seed)
    began = time.time()
    fields = rosa_fields(name, plan.layers, plan.window, plan.sinks) | {"backend": plan.backend}
    rosa = RosaConfig(**fields)
    config = TuneConfig(rosa=rosa, lr=plan.lr, seed=seed, **VARIANTS[name].tune)
    length = train.ids.shape[1]
    device = next(model.parameters()).device
    head = Head(model.get_output_embeddings().weight, None)
    attach(model, rosa)
    kind = VARIANTS[name].reads
    if kind != "match":
        for adapter in adapters_of(model).values():
            misread(adapter, kind)
    rule = VARIANTS[name].rule
    if rule is not None:
        for adapter in adapters_of(model).values():
            write_rule(adapter, rule)
    set_trainable(model)
    teacher = None
    if config.address_loss != "none":
        teacher = AddressTeacher(config.address_loss, config.address_samples)
    wrapped = LossModel(model, head, teacher=teacher, teacher_weight=config.address_weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    reads: Reads = {}
    result: dict[str, Any] = {
        "variant": name,
        "seed": seed,
        "what": VARIANTS[name].what,
        "plan": plan._asdict(),
        "rosa": fields,
        "tune": dict(VARIANTS[name].tune),
        "reads": kind,
        "parameters": sum(p.numel() for p in trained),
        "before": measure_health(model, heldout, plan, reads),
    }

    steps = max(1, plan.tokens // (plan.batch * length))
    order = torch.randperm(len(train.ids), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.99))
    warmup = max(1, round(0.05 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    log: list[dict[str, float]] = []
    if VARIANTS[name].teach_first:
        assert teacher is not None
        teach_first(model, teacher, train, order, plan, config, VARIANTS[name].teach_first)
        result["taught"] = measure_health(model, heldout, plan, reads)
    started = time.time()
    for step in range(1, steps + 1):
        rows = order[torch.arange((step - 1) * plan.batch, step * plan.batch) % len(order)]
        ids = train.ids[rows].to(device, torch.int64)
        train.give(rows)
        wrapped.observe = step % max(1, steps // 6) == 0
        loss = wrapped(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if wrapped.observe:
            log.append({"step": step, "loss": float(loss.detach())} | wrapped.health)
    seconds = time.time() - started
    result |= {
        "steps": steps,
        "tokens": steps * plan.batch * length,
        "tokens_a_second": round(steps * plan.batch * length / seconds),
        "log": log,
        "after": measure_health(model, heldout, plan, reads),
        "heldout": measure_nats(model, head, heldout),
        "learned": learned_tables(model),
        "seconds": round(time.time() - began, 1),
    }
    atomic_write(output, json.dumps(result, indent=1) + "\n")
    late = {part: round(nats, 4) for part, nats in result["heldout"].items()}
    print(f"{name} {seed}: {steps} steps in {seconds:.0f} s, {late}", flush=True)


def teach_first(
    model: Any,
    teacher: AddressTeacher,
    train: Text,
    order: Tensor,
    plan: Plan,
    config: TuneConfig,
    steps: int,
) -> None:
    """Train addresses alone; the outputs are still zero, so the model is the frozen one."""
    addressing = [
        p
        for adapter in adapters_of(model).values()
        for part in (adapter.q_proj, adapter.k_proj, adapter.selection)
        if part is not None
        for p in part.parameters()
    ]
    optimizer = torch.optim.AdamW(
        addressing, lr=config.lr * config.qk_lr_scale, betas=(0.9, 0.99), weight_decay=0.0
    )
    device = next(model.parameters()).device
    for step in range(steps):
        rows = order[torch.arange(step * plan.batch, (step + 1) * plan.batch) % len(order)]
        inputs = {"input_ids": train.ids[rows].to(device, torch.int64), "use_cache": False}
        train.give(rows)
        with torch.no_grad(), record_matches(model, keep_inputs=True) as contexts:
            decoder_of(model)(**inputs)
        teacher.loss(model, contexts[-1], inputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def learned_tables(model: Any) -> dict[str, dict[str, list[float]]]:
    """What the selections of each layer add for lengths (half octaves) and distances (octaves)."""
    return {
        str(index): {
            name: (chosen.pace * table.float()).tolist()
            for name, table in (
                ("length", chosen.length_score),
                ("distance", chosen.distance_score),
                ("rank", chosen.rank_score),
            )
        }
        for index, adapter in adapters_of(model).items()
        if (chosen := adapter.selection) is not None
    }


@torch.no_grad()
def measure_nats(model: Any, head: Head, text: Text) -> dict[str, float]:
    """Held-out nats a token by position: tokens before the predicted one."""
    length = text.ids.shape[1]
    device = next(model.parameters()).device
    edges = torch.tensor([e for e in EDGES if e < length] + [length])
    bucket = torch.bucketize(torch.arange(1, length), edges, right=True) - 1
    total = torch.zeros(len(edges) - 1, dtype=torch.float64)
    for row in range(len(text.ids)):
        ids = text.ids[row : row + 1].to(device, torch.int64)
        text.give(torch.tensor([row]))
        hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0]
        log_p = log_probs_of(hidden[0, :-1], ids[0, 1:, None], head)[:, 0]
        total.index_add_(0, bucket, -log_p.double().cpu())
    mean = total / (torch.bincount(bucket, minlength=len(total)) * len(text.ids))
    parts = zip(edges[:-1].tolist(), edges[1:].tolist(), mean.tolist(), strict=True)
    return {f"{start}-{stop}": nats for start, stop, nats in parts}


@torch.no_grad()
def measure_health(
    model: Any, text: Text, plan: Plan, reads: Reads, rows: int = 3
) -> dict[str, Any]:
    """What each layer's matches point at on held-out text, and the entropy of its symbols.

    Args:
        reads: positions read by row and layer when this was first called, which `changed` compares
            with: the share of routes and positions that read elsewhere, or nothing, by now.
    """
    adapters = adapters_of(model)
    if not any(adapter.retrieve for adapter in adapters.values()):
        return {}
    device = next(model.parameters()).device
    found: dict[int, list[dict[str, float]]] = {}
    for row in range(min(rows, len(text.ids))):
        ids = text.ids[row : row + 1].to(device, torch.int64)
        text.give(torch.tensor([row]))
        with record_matches(model, keep_inputs=True) as contexts:
            decoder_of(model)(input_ids=ids, use_cache=False)
        for index in contexts[-1].matches:
            values, _ = layer_health(adapters[index], contexts[-1], window=plan.window)
            position = contexts[-1].matches[index].position.cpu()
            first = reads.setdefault((row, index), position)
            values["changed"] = float((position != first).float().mean())
            found.setdefault(index, []).append(values)
    return {
        str(index): {
            name: sum(v.get(name, 0.0) for v in values) / len(values) for name in values[0]
        }
        for index, values in sorted(found.items())
    }
