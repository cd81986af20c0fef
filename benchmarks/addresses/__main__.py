"""Ablation of addresses on a frozen model: which retrieved channel closes how much of the gap.

    python -m benchmarks.addresses --model SmolLM2-135M-Instruct.Q4_1.gguf --output out \
        --variants control token hash hash-refined ceiling --seeds 0 1 2 --tokens 1000000
    python -m benchmarks.addresses.table out --json docs/results/addresses.json

Adapters sit in the upper layers; what enters those is computed once (`halves`). Several processes
share each GPU, and each trains one variant and seed after the other.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

from benchmarks.addresses.variants import CUT, LAYERS, VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="local folder, GGUF file or hub name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--extras",
        nargs="*",
        default=[],
        choices=list(VARIANTS),
        help="variants that come after the others, time permitting",
    )
    parser.add_argument(
        "--extra-seeds", type=int, nargs="*", default=[], help="seeds of extras; none for all"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heldout", type=int, default=96, help="held-out blocks")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cut", type=int, default=CUT, help="lowest layer that is trained in")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.add_argument("--cards", nargs="*", default=[], help="GPUs that the processes share")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins that ends later")
    parser.add_argument("--packages", nargs="*", default=["torch", "transformers"])
    parser.add_argument("--cache", type=Path, help="folder for blocks, model and hidden states")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.cache = options.cache or options.output / "cache"
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.part is None:
        conduct(options)
    elif options.part in ("windowed", "full"):
        compute(options)
    elif options.part == "check":
        check(options)
    else:
        work(options, int(options.part))


def conduct(options: argparse.Namespace) -> None:
    """Start all processes; each waits for what it needs."""
    for pattern in ("*.ready", "*.claim"):
        for flag in options.cache.glob(pattern):
            flag.unlink()
    runs = runs_of(options)
    parts = ["windowed", *(["full"] if any(n == "ceiling" for n, _ in runs) else [])]
    parts += ["check", *(str(worker) for worker in range(options.workers))]
    command = [sys.executable, "-m", "benchmarks.addresses", *sys.argv[1:]]
    command += ["--began", str(options.began), "--part"]
    # They import what they need while the model is prepared.
    running = [
        subprocess.Popen([*command, part], env=environment(options.cards, number))
        for number, part in enumerate(parts)
    ]
    try:
        prepare(options)
    except BaseException:
        for process in running:
            process.kill()
        raise
    (options.cache / "prepared.ready").touch()
    print(f"prepared in {time.time() - options.began:.0f} s", flush=True)
    codes = {part: process.wait() for part, process in zip(parts, running, strict=True)}
    print(f"exit codes {codes} after {time.time() - options.began:.0f} s", flush=True)


def environment(cards: list[str], number: int) -> dict[str, str]:
    """This process's environment with the card of the process of that number."""
    if not cards:
        return dict(os.environ)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": cards[number % len(cards)]}


def runs_of(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Variants and seeds in the order of their importance."""
    return [
        (name, seed)
        for names, seeds in (
            (options.variants, options.seeds),
            (options.extras, options.extra_seeds or options.seeds),
        )
        for seed in seeds
        for name in names
    ]


def prepare(options: argparse.Namespace) -> None:
    """Blocks and a quickly loaded copy of the model, once for all processes."""
    from benchmarks.addresses.data import blocks_of_code
    from rosakit.tuning.sources import load_model

    blocks, model_file = options.cache / "blocks.pt", options.cache / "model.pt"
    model, tokenizer = load_model(options.model, dtype="bfloat16", device="cpu")
    model.config.quantization_config = None
    torch.save(model, model_file)
    if not blocks.exists():
        found = blocks_of_code(
            tokenizer,
            length=options.length,
            train=options.tokens // options.length,
            heldout=options.heldout,
            packages=options.packages,
        )
        torch.save(found, blocks)


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_float32_matmul_precision("high")
    wait_for(options, "prepared")
    blocks = torch.load(options.cache / "blocks.pt")
    model = torch.load(options.cache / "model.pt", weights_only=False)
    cuda = torch.cuda.is_available()
    model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    return model.eval().requires_grad_(False), blocks


def wait_for(options: argparse.Namespace, what: str) -> None:
    while not (options.cache / f"{what}.ready").exists():
        time.sleep(0.2)


def check(options: argparse.Namespace) -> None:
    """Choose the matcher of all runs: the GPU's where it finds what the core finds on this text.

    In a process of its own, since a fault of a kernel ends every later call of the process.
    """
    from rosakit.layers.hashing import context_codes, token_windows
    from rosakit.ops import suffix_match

    backend = "cpu"
    try:
        wait_for(options, "prepared")
        ids = torch.load(options.cache / "blocks.pt")["heldout"][:2]
        for bits, orders, least in ((8, (1, 3, 8), 2), (4, (1,), 1)):
            codes = context_codes(token_windows(ids, max(orders)), orders, routes=12, bits=bits)
            for flips in (0, bits):
                found = [
                    suffix_match(x, x, min_length=least, counterfactual_bits=flips)
                    for x in (codes, codes.to("cuda" if torch.cuda.is_available() else "cpu"))
                ]
                for one, other in zip(*found, strict=True):
                    assert one is None or torch.equal(one, other.cpu())
        backend = "auto"
    except Exception:
        traceback.print_exc()
    finally:
        (options.cache / "backend").write_text(backend)
        (options.cache / "checked.ready").touch()
    print(f"matcher: {backend}, after {time.time() - options.began:.0f} s", flush=True)


def compute(options: argparse.Namespace) -> None:
    """What enters the upper layers, with windowed or full attention below."""
    from benchmarks.addresses.halves import compute_hidden

    model, blocks = load(options)
    window = options.window if options.part == "windowed" else None
    for part in ("train", "heldout"):
        path = options.cache / f"{options.part}-{part}.bin"
        compute_hidden(
            model, blocks[part], path, cut=options.cut, window=window, sinks=options.sinks
        )
    (options.cache / f"{options.part}.ready").touch()
    print(f"{options.part} after {time.time() - options.began:.0f} s", flush=True)


def work(options: argparse.Namespace, worker: int) -> None:
    """One run after the other that no other worker has begun, as long as there is time."""
    from benchmarks.addresses.halves import Given, open_hidden, upper_half
    from benchmarks.addresses.train import Plan, Text, train_variant

    model, blocks = load(options)
    parameter = next(model.parameters())
    plan = Plan(
        options.tokens,
        options.batch,
        options.lr,
        tuple(layer - options.cut for layer in options.layers),
        options.window,
        options.sinks,
        "auto",
    )
    upper = upper_half(model, options.cut)
    del model
    longest = 0.0
    for name, seed in runs_of(options):
        if time.time() - options.began + longest > options.seconds:
            print(f"worker {worker}: no time for {name} {seed}", flush=True)
            break
        if (options.output / f"{name}-{seed}.json").exists():
            continue  # of an earlier call that went on here
        try:
            (options.cache / f"{name}-{seed}.claim").touch(exist_ok=False)
        except FileExistsError:
            continue
        kind = "full" if name == "ceiling" else "windowed"
        wait_for(options, kind)
        wait_for(options, "checked")
        plan = plan._replace(backend=(options.cache / "backend").read_text())
        began = time.time()
        fresh = copy.deepcopy(upper)
        width = fresh.config.hidden_size
        texts = []
        for part in ("train", "heldout"):
            path = options.cache / f"{kind}-{part}.bin"
            hidden = open_hidden(path, blocks[part], width, parameter.dtype)
            given = Given.of(fresh)
            texts.append(Text(blocks[part], partial(given.take, hidden, parameter.device)))
        try:
            train_variant(fresh, *texts, name, seed, plan, options.output / f"{name}-{seed}.json")
        except Exception as error:
            traceback.print_exc()
            if "CUDA" in str(error):
                break  # nothing that this process does on the GPU would work any more
        longest = max(longest, time.time() - began)


if __name__ == "__main__":
    main()
