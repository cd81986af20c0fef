"""Training throughput on several GPUs of one host against one of them: DDP and FSDP2.

    torchrun --nproc-per-node 4 -m benchmarks.distributed --out docs/results/distributed.json
    torchrun --nproc-per-node 2 -m benchmarks.distributed --tiny      # two CPU processes, seconds

The model has the shape of Qwen3-1.7B and random float32 weights made on the GPU, and computes in
bfloat16: window 2048, default adapters and the token route, everything trained by AdamW, one row of
8192 tokens a GPU and step, gradient checkpointing. First rank 0 trains alone, then 2, 4, … of the
processes together, replicated and sharded by decoder layer as accelerate does it, while the others
wait.

Checks come first: in two steps all processes train on the row of the single GPU, so that their mean
gradient is its gradient and their losses must be its losses. A mode for which they are not reports
no time. Then every process gets a row of its own and the steps are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from benchmarks.decode import SEED, SHAPE, SMALL, build, text
from benchmarks.results import facts, merge
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.loss import LossModel, find_head

CHECKED = 2
"""Steps whose losses are compared with those of one GPU."""

TOLERANCE = 1e-2
"""Relative. Products are bfloat16, and sums of gradients are rounded in another order."""


def loss_model(shape: dict[str, int], device: str, window: int) -> LossModel:
    """A model of which everything is trained; the same weights in every process."""
    # float32 weights, as the guide asks: FSDP2 shards parameters of one type together.
    plain = build(shape, device, torch.float32)
    head = find_head(plain)
    torch.manual_seed(SEED)
    attach(plain, RosaConfig(window=window, token_route=True, adapter_dtype="auto"))
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    return LossModel(plain.train(), head)


def wrap(model: LossModel, mode: str, mesh: DeviceMesh) -> torch.nn.Module:
    """The model replicated or sharded over the processes of a mesh."""
    if mode == "DDP":
        devices = [torch.cuda.current_device()] if mesh.device_type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=devices, process_group=mesh.get_group(), gradient_as_bucket_view=True
        )
    if mode == "FSDP2":
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
    return model


def train(
    model: torch.nn.Module, common: torch.Tensor, own: torch.Tensor, steps: int
) -> tuple[list[float], list[float]]:
    """Losses of the steps on the common row, and seconds of each step on the own one.

    The first of the latter warms up and is left out.
    """
    on_gpu = own.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    losses, times = [], []
    for ids in [common] * CHECKED + [own] * (steps + 1):
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
    return losses[:CHECKED], times[CHECKED + 1 :]


def attempt(
    mode: str, mesh: DeviceMesh, setting: dict[str, Any], rows: torch.Tensor
) -> dict[str, Any]:
    """`run`, or what stopped it: what stops one process in the same way as the others does not
    end the launch, and the others of the modes are still measured."""
    try:
        return run(mode, mesh, setting, rows)
    except (RuntimeError, TypeError, AssertionError) as error:
        return {"mode": mode, "processes": mesh.size(), "error": str(error)[:300]}


def run(mode: str, mesh: DeviceMesh, setting: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """One mode on the processes of a mesh; `rows` has one row a process."""
    on_gpu, rank = mesh.device_type == "cuda", distributed.get_rank()
    device = str(torch.device("cuda", torch.cuda.current_device())) if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = wrap(loss_model(setting["shape"], device, setting["window"]), mode, mesh)
    rows = rows.to(device)
    losses, times = train(model, rows[:1], rows[rank : rank + 1], setting["steps"])
    step = statistics.median(times)
    return {
        "mode": mode,
        "processes": mesh.size(),
        "losses": losses,
        "step_ms": 1e3 * step,
        "step_ms_each": [round(1e3 * t, 1) for t in times],
        "tokens_per_s": mesh.size() * rows.shape[1] / step,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def compared(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """The row against one GPU; without times if its losses are others."""
    if "error" in row or "error" in alone:
        return row
    worst = max(abs(a / b - 1) for a, b in zip(row["losses"], alone["losses"], strict=True))
    row["losses_differ"] = worst
    if not worst <= TOLERANCE:
        kept = {name: row[name] for name in ("mode", "processes", "losses", "losses_differ")}
        return kept | {"error": f"the losses are not those of one GPU within {TOLERANCE}"}
    row["throughput_vs_one"] = row["tokens_per_s"] / alone["tokens_per_s"]
    row["efficiency"] = row["throughput_vs_one"] / row["processes"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file whose section 'throughput' is replaced")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--timeout", type=float, default=120, help="seconds to wait for others")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A process that is left alone in a collective ends the launch instead of holding the machine.
    limit = dt.timedelta(seconds=arguments.timeout)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    shape, length, window = SHAPE, arguments.length, 2048
    if arguments.tiny:
        shape, length, window = SMALL, 256, 32
    setting = {"shape": shape, "length": length, "window": window, "steps": arguments.steps}
    section: dict[str, Any] = {**facts(), **setting, "rows": []}
    rows = text(length * world, shape["vocab_size"]).view(world, length)
    sizes = [2**i for i in range(world.bit_length()) if 2**i <= world]
    # Every process takes part in making every mesh.
    kind = "cuda" if on_gpu else "cpu"
    meshes = {n: DeviceMesh(kind, list(range(n))) for n in sizes}
    alone: dict[str, Any] = {}
    for n in sizes:
        for mode in ("one GPU",) if n == 1 else ("DDP", "FSDP2"):
            row = attempt(mode, meshes[n], setting, rows) if rank < n else {}
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
            distributed.barrier()
            if rank:
                continue
            alone = alone or row
            section["rows"].append(compared(row, alone))
            print(json.dumps(section["rows"][-1]), flush=True)
            if arguments.out is not None:
                merge(arguments.out, "throughput", section)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
