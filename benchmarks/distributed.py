"""Training throughput on several GPUs of one host against one of them: DDP and FSDP2.

    torchrun --nproc-per-node 2 -m benchmarks.distributed --out docs/results/tuning.json
    torchrun --nproc-per-node 2 -m benchmarks.distributed --tiny      # two CPU processes, seconds

The model has the shape of Qwen3-0.6B, random float32 weights, computed in bfloat16: window 1024,
default adapters and the token route, everything trained, one row of 8192 tokens a GPU and step,
gradient checkpointing. First rank 0 trains alone while the others wait, then all together,
replicated and sharded by decoder layer as accelerate does it. A mode whose first loss on rank 0's
row is not that of one GPU reports no time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.decode import SEED, SMALL, build, text
from benchmarks.results import facts, merge
from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.loss import LossModel, find_head

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def loss_model(shape: dict[str, int], device: str, window: int) -> LossModel:
    """A model of which everything is trained; the same weights in every process."""
    plain = build(shape, device, torch.float32)
    head = find_head(plain)
    torch.manual_seed(SEED)
    attach(plain, RosaConfig(window=window, token_route=True))
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    return LossModel(plain.train(), head)


def replicated(model: LossModel, on_gpu: bool) -> torch.nn.Module:
    devices = [torch.cuda.current_device()] if on_gpu else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)


def sharded(model: LossModel, on_gpu: bool) -> torch.nn.Module:
    dtype = torch.bfloat16 if on_gpu else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mp_policy=policy)
    return model


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Seconds of each step but the first, and the first loss."""
    on_gpu = ids.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=on_gpu)
    times, first = [], None
    for _ in range(steps + 1):
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
        first = float(loss.detach()) if first is None else first
    assert first is not None
    return times[1:], first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file whose section 'distributed' is replaced"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    shape, length, window = (SMALL, 256, 32) if arguments.tiny else (SHAPE, 8192, 1024)
    device = f"cuda:{local}" if on_gpu else "cpu"
    ids = text(length * world, shape["vocab_size"]).view(world, length)[rank : rank + 1].to(device)
    section: dict[str, Any] = {
        **facts(),
        "shape": shape,
        "length": length,
        "window": window,
        "rows": [],
    }
    alone: dict[str, Any] = {}
    for name, wrap in (("one GPU", None), ("DDP", replicated), ("FSDP2", sharded)):
        row: dict[str, Any] = {"mode": name, "processes": 1 if wrap is None else world}
        if wrap is not None or rank == 0:
            model = loss_model(shape, device, window)
            model = model if wrap is None else wrap(model, on_gpu)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times, first = train(model, ids, arguments.steps)
            row |= {
                "first_loss": first,
                "step_ms": 1e3 * statistics.median(times),
                "step_ms_each": [round(1e3 * t, 1) for t in times],
                "tokens_per_s": row["processes"] * length / statistics.median(times),
                "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            }
            del model
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
        distributed.barrier()
        if rank:
            continue
        alone = alone or row
        # FSDP2 computes norms and residuals in bfloat16 as well, DDP's autocast does not.
        tolerance = 2e-2 if name == "FSDP2" else 1e-4
        assert abs(row["first_loss"] - alone["first_loss"]) <= tolerance * alone["first_loss"], row
        row["throughput_vs_one"] = row["tokens_per_s"] / alone["tokens_per_s"]
        section["rows"].append(row)
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            merge(arguments.out, "distributed", section)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
