"""Train and measure the arms of the evidence, and put the results together.

    python -m benchmarks.evidence prepare --model MODEL.gguf --books FOLDER --work /tmp/evidence
    python -m benchmarks.evidence run --model MODEL.gguf --work /tmp/evidence --arm rosa --seed 0
    python -m benchmarks.evidence work --model MODEL.gguf --work /tmp/evidence --seconds 500
    python -m benchmarks.evidence collect --work /tmp/evidence --output docs/results/evidence

`run` is one run; `work` does all runs of a plan (`plan.py`, `sweeps.py`) that no other process has
claimed, so that several processes share a GPU or several GPUs, and starts none that would not end
in time. A finished run is kept; one that ran out of time counts in no table.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import collect, corpus
from benchmarks.evidence.arms import arms
from benchmarks.evidence.fast_norm import fuse_norms
from benchmarks.evidence.measure import Tasks, measure
from benchmarks.evidence.plan import PLAN, Planned, claimed
from benchmarks.evidence.sweeps import LONG, SWEEP
from benchmarks.evidence.train import Learner, Sizes

PLANS = {"main": PLAN, "sweep": SWEEP, "long": LONG}


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
        model, tokenizer = _load(options)
        run(
            Planned(options.arm, options.seed, options.window, options.tokens),
            model,
            tokenizer,
            options.block,
            options.batch,
            _tasks(options),
            options.work,
            began + options.seconds,
        )
    elif options.command == "work":
        model, tokenizer = _load(options)
        plan = PLANS[options.plan]
        queue = [p._replace(tokens=int(p.tokens * options.scale)) for p in plan]
        if options.every_arm:
            once = dict.fromkeys((p.arm, p.window) for p in plan)
            queue = [Planned(arm, 0, window, options.tokens) for arm, window in once]
        queue = queue[: options.first]
        for planned in claimed(queue, options.work / "runs", began + options.seconds):
            try:
                run(
                    planned,
                    model,
                    tokenizer,
                    options.block,
                    options.batch,
                    _tasks(options),
                    options.work,
                    began + options.seconds - 20,
                )
            except Exception:
                # One arm that fails must not take the others with it; it is missing, and said to.
                print(f"{planned.name} failed", traceback.format_exc(), flush=True)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    else:
        collect.collect(options.work, options.output, model=options.name)
    return 0


def run(
    planned: Planned,
    model: Any,
    tokenizer: Any,
    block: int,
    batch: int,
    tasks: Tasks,
    work: Path,
    deadline: float,
) -> Path:
    """Train and measure one arm with one seed; returns the file of its result.

    The model comes back as it was.
    """
    target = work / "runs" / f"{planned.name}.json"
    if target.exists():
        return target
    arm, seed = arms(planned.window)[planned.arm], planned.seed
    sizes = Sizes(planned.tokens, block, batch, window=planned.window)
    kinds = corpus.load(work)
    learner = Learner(model, arm, planned.window, seed)
    training: dict[str, Any] = {}
    try:
        if arm.trains:
            blocks = {kind: found[0] for kind, found in kinds.items()}
            training = learner.train(blocks, sizes, deadline)
            print(f"{planned.name}: {training['tokens']:,} tokens in {training['seconds']} s, "
                  f"loss {training['losses'][-1]:.3f}", flush=True)  # fmt: skip
        heldout = {kind: found[1] for kind, found in kinds.items()}
        tasks = dataclasses.replace(tasks, window=planned.window)
        began = time.monotonic()
        variant = measure(learner, tokenizer, heldout, tasks)
        if arm.view.recall:
            sample = torch.from_numpy(heldout["code"][:4].astype("int64")).to(learner.device)
            counts = [learner.extra_keys(row[None]) for row in sample]
            training["extra_keys"] = round(sum(counts) / len(counts), 1)
        training["seconds_measuring"] = round(time.monotonic() - began, 1)
    finally:
        learner.remove()
    collect.write_run(
        target, variant, planned, training, dataclasses.asdict(sizes), dataclasses.asdict(tasks)
    )
    shown = {k: round(v, 2) for k, v in variant.perplexity.ppl_by_position.items()}
    needles = None if variant.niah is None else variant.niah.accuracy_beyond
    print(f"{planned.name}: {shown}, needles {needles}", flush=True)
    return target


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from rosakit.tuning.sources import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and options.reserve:
        _reserve(options.reserve)
    torch.backends.cuda.matmul.allow_tf32 = True
    model, tokenizer = load_model(options.model, dtype="auto", device=device)
    fuse_norms(model)
    return model, tokenizer


def _tasks(options: argparse.Namespace) -> Tasks:
    return Tasks(
        options.window, 4, tuple(options.lengths), samples=options.samples,
        documents=options.documents, short=options.short,
    )  # fmt: skip


def _reserve(gib: float) -> None:
    """Take memory of a shared GPU into this process's allocator, waiting until there is enough."""
    torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")  # the library's workspace
    for _ in range(120):
        try:
            torch.empty(int(gib * 2**30), dtype=torch.uint8, device="cuda")
            return
        except torch.OutOfMemoryError:
            time.sleep(2)
    raise SystemExit(f"no {gib} GiB of GPU memory became free within four minutes")


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
    worker = commands.add_parser("work", help="every run of the plan that nobody has claimed")
    worker.add_argument("--plan", choices=list(PLANS), default="main")
    worker.add_argument(
        "--every-arm", action="store_true", help="each arm of the plan once: a smoke test"
    )
    worker.add_argument("--scale", type=float, default=1.0, help="of the plan's training tokens")
    worker.add_argument("--first", type=int, help="so many runs of the plan; all without")
    for command in (single, worker):
        command.add_argument("--window", type=int, default=512)
        command.add_argument("--batch", type=int, default=2, help="sequences a step")
        command.add_argument("--seconds", type=float, default=3600, help="training ends by then")
        command.add_argument(
            "--lengths", type=int, nargs="*", default=[4096, 8192], help="tokens of the prompts"
        )
        command.add_argument("--samples", type=int, default=2, help="prompts a cell")
        command.add_argument("--reserve", type=float, default=0, help="GiB of a shared GPU to hold")
        command.add_argument("--documents", type=int, default=16, help="held-out texts a kind")
        command.add_argument("--short", type=int, default=300, help="short-context items a task")
    for command in (prepare, single, worker):
        command.add_argument("--model", required=True, help="folder, GGUF file or hub name")
        command.add_argument("--tokens", type=int, default=2_000_000, help="trained on")
        command.add_argument("--block", type=int, default=4096, help="tokens of a sequence")
    gather = commands.add_parser("collect", help="tables, plots and JSON of all runs")
    gather.add_argument("--output", type=Path, required=True)
    gather.add_argument("--name", default="SmolLM2-135M-Instruct")
    for command in (prepare, single, worker, gather):
        command.add_argument("--work", type=Path, required=True, help="texts and runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
