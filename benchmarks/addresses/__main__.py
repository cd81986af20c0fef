"""Ablation of addresses on a frozen model: which retrieved channel closes how much of the gap.

    python -m benchmarks.addresses --model SmolLM2-135M-Instruct.Q4_1.gguf --output out \
        --variants control token hash hash-refined ceiling --seeds 0 1 2 --tokens 4700000
    python -m benchmarks.addresses.table out/*.json --json docs/results/addresses.json

Every variant runs in a process of its own, several at a time on each GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.addresses.variants import LAYERS, VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="local folder, GGUF file or hub name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=4_700_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heldout", type=int, default=96, help="held-out blocks")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--parallel", type=int, default=4, help="processes a GPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="wall-clock budget")
    parser.add_argument("--packages", nargs="*", default=["torch", "transformers"])
    parser.add_argument("--cache", type=Path, help="folder for blocks and a copy of the model")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.cache = options.cache or options.output / "cache"
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.one:
        run_one(options)
    else:
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    began = time.time()
    prepare(options)
    print(f"prepared in {time.time() - began:.0f} s", flush=True)
    jobs = [(name, seed) for seed in options.seeds for name in options.variants]
    gpus = max(1, torch.cuda.device_count())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    running: dict[int, tuple[subprocess.Popen[bytes], str]] = {}
    deadline = began + options.seconds
    while jobs or running:
        for place in range(gpus * options.parallel):
            if place in running and running[place][0].poll() is not None:
                process, name = running.pop(place)
                print(f"{name}: exit {process.returncode}", flush=True)
            if place not in running and jobs and time.time() < deadline:
                name, seed = jobs.pop(0)
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible[place % gpus]}
                command = [sys.executable, "-m", "benchmarks.addresses", *sys.argv[1:]]
                # What remains is shared by the jobs that wait for this place.
                waves = 1 + (len(jobs) // (gpus * options.parallel))
                share = (deadline - time.time()) / waves
                command += ["--one", name, str(seed), "--seconds", str(share)]
                process = subprocess.Popen(command, env=environment)
                running[place] = process, f"{name} {seed}"
        if time.time() >= deadline and not running:
            break
        time.sleep(0.5)
    if jobs:
        print(f"out of time before {jobs}", flush=True)


def prepare(options: argparse.Namespace) -> None:
    """Blocks and a quickly loaded copy of the model, once for all processes."""
    from benchmarks.addresses.data import blocks_of_code
    from rosakit.tuning.sources import load_model

    blocks, copy = options.cache / "blocks.pt", options.cache / "model"
    if blocks.exists() and copy.exists():
        return
    model, tokenizer = load_model(options.model, dtype="bfloat16", device="cpu")
    model.config.quantization_config = None
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    model.save_pretrained(copy)
    found = blocks_of_code(
        tokenizer,
        length=options.length,
        train=-(-options.tokens // options.length),
        heldout=options.heldout,
        packages=options.packages,
    )
    torch.save(found, blocks)
    print({part: tuple(found[part].shape) for part in ("train", "heldout")}, flush=True)


def run_one(options: argparse.Namespace) -> None:
    began = time.time()
    from transformers import AutoModelForCausalLM

    from benchmarks.addresses.train import train_variant

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    name, seed = options.one[0], int(options.one[1])
    cuda = torch.cuda.is_available()
    blocks = torch.load(options.cache / "blocks.pt")
    model = AutoModelForCausalLM.from_pretrained(
        options.cache / "model", dtype=torch.bfloat16 if cuda else torch.float32
    )
    model.to("cuda" if cuda else "cpu").eval().requires_grad_(False)
    train_variant(
        model,
        blocks,
        name,
        seed=seed,
        tokens=options.tokens,
        batch=options.batch,
        lr=options.lr,
        layers=tuple(options.layers),
        window=options.window,
        seconds=0.85 * options.seconds - (time.time() - began),
        output=options.output / f"{name}-{seed}.json",
    )


if __name__ == "__main__":
    main()
