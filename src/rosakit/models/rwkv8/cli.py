"""``rosakit rwkv8``: train the demos' models, run checkpoints, generate text."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from torch import Tensor

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.models.rwkv8 import curves, tasks
from rosakit.models.rwkv8.accuracy import Accuracy, evaluate
from rosakit.models.rwkv8.generation import generate, likeliest
from rosakit.models.rwkv8.loading import family_of, load
from rosakit.models.rwkv8.models import parameters_of
from rosakit.models.rwkv8.tasks import Batch
from rosakit.models.rwkv8.tokenizer import WorldTokenizer
from rosakit.models.rwkv8.training import Progress, TrainConfig, Trainer, TrainResult

rwkv8_app = typer.Typer(
    help="RWKV-8 ROSA models: train the demos, run published checkpoints, generate text.",
    no_args_is_help=True,
)

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")]
Bits = Annotated[
    int | None, typer.Option(help="Bits a route, 1 or 4, where the file does not tell.")
]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


@rwkv8_app.command("train")
def train_command(
    task: Annotated[str, typer.Option(help="count, reverse or arithmetic.")] = "count",
    out: Annotated[Path | None, typer.Option(help="Folder of the run: weights, curve.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in that folder.")] = False,
    estimator: Annotated[
        str, typer.Option(help="Gradient estimator of the ROSA layers.")
    ] = "counterfactual",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the estimator, NAME=VALUE; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 128,
    layers: Annotated[
        int | None, typer.Option(help="Layers; counting: 0 is the token memory alone.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Channels; by default the demo's.")] = None,
    bits: Annotated[int, typer.Option(help="Bits a route, 1 or 4.")] = 1,
    rosa: Annotated[bool, typer.Option(help="--no-rosa trains the control without ROSA.")] = True,
    digits: Annotated[int | None, typer.Option(help="Longest numbers; the demo's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; the demo's.")] = None,
    learning_rate: Annotated[float, typer.Option(help="At the start of the cosine.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.01,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the sequences.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 200,
    device: Device = "cpu",
) -> None:
    """Train a demo's model from scratch; prints accuracy by length at the end."""
    config = TrainConfig(
        task=task,
        estimator=estimator,
        estimator_options=_options(option or []),
        channels=channels,
        layers=layers,
        bits=bits,
        rosa=rosa,
        digits=digits,
        length=length,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        device=device,
    )
    console = Console()
    trainer = Trainer(config, out, resume=resume)
    console.print(
        f"{task}: {family_of(trainer.model)} model, {parameters_of(trainer.model):,} parameters, "
        f"estimator {estimator}, {steps} steps of {batch} x {trainer.task.length} tokens"
        + (f", resumed at step {trainer.step}" if trainer.step else "")
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        line = bar.add_task("train", total=steps, completed=trainer.step, loss="-")

        def report(progress: Progress) -> None:
            bar.update(line, completed=progress.step, loss=f"{progress.loss:.4f}")

        result = trainer.run(report, save_every)
    _print_training(console, result)
    if out is not None:
        console.print(f"saved to {out} (model.safetensors, result.json)")


@rwkv8_app.command("run")
def run_command(
    checkpoint: Annotated[Path, typer.Argument(help=".pth, .npz, .safetensors or a run's folder.")],
    task: Annotated[
        str | None,
        typer.Option(help="count, reverse or arithmetic; by the vocabulary if left out."),
    ] = None,
    bits: Bits = None,
    digits: Annotated[int | None, typer.Option(help="Longest numbers; the demo's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the questions; the demo's.")] = None,
    show: Annotated[bool, typer.Option(help="Print every sequence as the demos do.")] = False,
    json_out: JsonOut = None,
    device: Device = "cpu",
) -> None:
    """Accuracy of a checkpoint on its demo, counted plainly and as the published script does."""
    console = Console()
    model = load(checkpoint, bits, device=device)
    name = task or tasks.for_vocabulary(model.vocabulary)
    if name is None:
        raise InvalidInputError(
            f"{checkpoint} has a vocabulary of {model.vocabulary}, which is no demo's; "
            "`rosakit rwkv8 generate` runs language models"
        )
    # The counting demo starts at fixed numbers; digits there only shapes training sequences.
    chosen = tasks.make(name, digits)
    console.print(
        f"{checkpoint.name}: {family_of(model)} model, {model.config.layers} layers, "
        f"{model.config.channels} channels, {model.bits} bit(s) a route, "
        f"{parameters_of(model):,} parameters"
    )

    def print_batch(batch: Batch, answers: Tensor) -> None:
        for text in _sequences(batch, answers, chosen.symbols):
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    result = evaluate(model, chosen, seed, print_batch if show else None)
    _print_accuracy(console, result)
    if chosen.sums_running_totals:
        right, counted = result.running_total
        console.print(
            f"SUM of running totals (the demo's figure): {right} of {counted} = "
            f"{right / counted:.2%}"
        )
    if json_out is not None:
        _write_json(json_out, {"checkpoint": checkpoint.name, **result.to_dict()})


@rwkv8_app.command("generate")
def generate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A pure ROSA language model.")],
    vocab: Annotated[Path, typer.Option(help="RWKV's rwkv_vocab_v20230424.txt.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "When",
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of probability to draw from.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    bits: Bits = None,
    device: Device = "cpu",
    half: Annotated[bool, typer.Option(help="Compute in float16, as published.")] = False,
) -> None:
    """The likeliest next tokens of a prompt, then its continuation."""
    tokenizer = WorldTokenizer(vocab)
    model = load(checkpoint, bits, device=device, dtype=torch.float16 if half else torch.float32)
    if len(tokenizer) > model.vocabulary:
        raise InvalidInputError(
            f"{vocab} has tokens up to {len(tokenizer) - 1} but the model a vocabulary of "
            f"{model.vocabulary}; it was trained with another one"
        )
    console = Console()
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InvalidInputError("the prompt is empty; pass --prompt TEXT")
    table = Table("next token", "probability")
    for token, probability in likeliest(model, ids, vocabulary=len(tokenizer)):
        text = repr(tokenizer.decode([token])) if token else "end of text"
        table.add_row(text, f"{probability:.2%}")
    console.print(table)
    sys.stdout.write(prompt)
    pending: list[int] = []
    drawn = generate(
        model,
        ids,
        tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        vocabulary=len(tokenizer),
    )
    for token in drawn:
        pending.append(token)  # characters may be split over tokens
        if "\ufffd" not in (text := tokenizer.decode(pending)) or len(pending) > 4:
            sys.stdout.write(text)
            sys.stdout.flush()
            pending.clear()
    sys.stdout.write(tokenizer.decode(pending) + "\n")


@rwkv8_app.command("plot")
def plot_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders or result.json of finished runs.")],
    out: Annotated[Path, typer.Option(help="Image to write.")] = Path("curves.png"),
) -> None:
    """Draw the training curves of finished runs side by side."""
    curves.plot([curves.read_result(run) for run in runs], out)
    Console().print(f"wrote {out}")


def _options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value a Python literal or else a word."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise InvalidInputError(f"--option takes NAME=VALUE, got {pair!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _print_training(console: Console, result: TrainResult) -> None:
    _print_accuracy(console, result.by_length, title="held-out sequences")
    console.print(
        f"loss, nats a counted token: {result.final_loss:.4f} (last 50 steps), "
        f"{result.validation_loss:.4f} held out; {result.seconds:.0f} s"
    )
    right, counted = result.demo.tokens
    console.print(f"the demo's own questions: {right} of {counted} = {right / counted:.2%}")


def _print_accuracy(console: Console, result: Accuracy, title: str | None = None) -> None:
    table = Table(result.size_name, "right", "counted", "accuracy", title=title)
    for size, (right, counted) in result.by_size.items():
        table.add_row(str(size), str(right), str(counted), f"{right / counted:.1%}")
    console.print(table)
    right, counted = result.tokens
    console.print(f"token accuracy (each token once): {right} of {counted} = {right / counted:.2%}")


def _sequences(batch: Batch, answers: Tensor, symbols: str) -> list[str]:
    """Input, truth, prediction and a mark a wrong prediction, over the counted part."""
    lines = []
    for row in range(len(batch.sizes)):
        counted = batch.counted[row]
        target, answer = batch.tokens[row, 1:][counted], answers[row][counted]
        first = int(counted.to(torch.int64).argmax())
        question = "".join(symbols[t] for t in batch.tokens[row, : first + 1].tolist())
        gold, guess = ("".join(symbols[t] for t in x.tolist()) for x in (target, answer))
        marks = "".join("." if a == b else "^" for a, b in zip(gold, guess, strict=True))
        lines.append(f"in {question}\n  gold {gold}\n  pred {guess}\n       {marks}")
    return lines


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
