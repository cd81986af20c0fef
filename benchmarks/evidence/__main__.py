"""Train and measure the arms of the evidence, and put the results together.

    python -m benchmarks.evidence prepare --model MODEL.gguf --books FOLDER --work /tmp/evidence
    python -m benchmarks.evidence run --model MODEL.gguf --work /tmp/evidence --arm rosa --seed 0
    python -m benchmarks.evidence collect --work /tmp/evidence --output docs/results/evidence

`run` is one process a run, so that several share a GPU or a machine of several; a finished run is
kept. `smoke` does all three on a model of random weights, in less than two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import collect, corpus
from benchmarks.evidence.arms import arms
from benchmarks.evidence.measure import Tasks, measure
from benchmarks.evidence.train import Learner, Sizes


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    if options.command == "prepare":
        from rosakit.tuning.sources import load_tokenizer

        corpus.prepare(
            load_tokenizer(options.model),
            options.work,
            books=options.books,
            length=options.length,
            block=options.block,
            tokens=options.tokens,
            heldout=options.heldout,
        )
    elif options.command == "run":
        from rosakit.tuning.sources import load_model

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_model(options.model, dtype="float32", device=device)
        sizes = Sizes(tokens=options.tokens, block=options.block, batch=options.batch,
                      accumulate=options.accumulate, window=options.window)  # fmt: skip
        tasks = Tasks(options.window, 4, tuple(options.lengths), samples=options.samples,
                      documents=options.documents)  # fmt: skip
        deadline = began + options.seconds
        run(options.arm, options.seed, model, tokenizer, sizes, tasks, options.work, deadline)
    else:
        collect.collect(options.work, options.output, model=options.name)
    return 0


def run(
    name: str,
    seed: int,
    model: Any,
    tokenizer: Any,
    sizes: Sizes,
    tasks: Tasks,
    work: Path,
    deadline: float,
) -> Path:
    """Train and measure one arm with one seed; returns the file of its result."""
    target = work / "runs" / f"{name}-w{sizes.window}-s{seed}.json"
    if target.exists():
        return target
    arm = arms(sizes.window)[name]
    kinds = corpus.load(work)
    learner = Learner(model, arm, sizes.window, seed)
    training: dict[str, Any] = {}
    if arm.trains:
        blocks = {kind: found[0] for kind, found in kinds.items()}
        training = learner.train(blocks, sizes, deadline)
        print(f"{name} seed {seed}: {training['tokens']:,} tokens in {training['seconds']} s, "
              f"loss {training['losses'][-1]:.3f}", flush=True)  # fmt: skip
    heldout = {kind: found[1] for kind, found in kinds.items()}
    variant = measure(learner, tokenizer, heldout, tasks)
    collect.write_run(
        target, variant, name, seed, training, dataclasses.asdict(sizes), dataclasses.asdict(tasks)
    )
    shown = {k: round(v, 2) for k, v in variant.perplexity.ppl_by_position.items()}
    print(f"{name} seed {seed}: {shown}", flush=True)
    return target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Arms trained alike, with every control.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="token ids of the texts")
    prepare.add_argument("--books", type=Path, help="folder of .txt files; code alone without")
    prepare.add_argument("--length", type=int, default=8192, help="tokens of a held-out text")
    prepare.add_argument("--heldout", type=int, default=32, help="held-out texts a kind")
    single = commands.add_parser("run", help="one arm with one seed")
    single.add_argument("--arm", required=True, choices=list(arms(256)))
    single.add_argument("--seed", type=int, default=0)
    single.add_argument("--window", type=int, default=256)
    single.add_argument("--batch", type=int, default=2)
    single.add_argument("--accumulate", type=int, default=2)
    single.add_argument("--seconds", type=float, default=3600, help="training ends by then")
    single.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192], help="of prompts")
    single.add_argument("--samples", type=int, default=4, help="prompts a cell")
    single.add_argument("--documents", type=int, default=32, help="held-out texts a kind")
    for command in (prepare, single):
        command.add_argument("--model", required=True, help="folder, GGUF file or hub name")
        command.add_argument("--tokens", type=int, default=4_000_000, help="trained on")
        command.add_argument("--block", type=int, default=4096, help="tokens of a sequence")
    gather = commands.add_parser("collect", help="tables, plots and JSON of all runs")
    gather.add_argument("--output", type=Path, required=True)
    gather.add_argument("--name", default="SmolLM2-135M-Instruct")
    for command in (prepare, single, gather):
        command.add_argument("--work", type=Path, required=True, help="texts and runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
