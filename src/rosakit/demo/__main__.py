"""Command line of the demo: ``python -m rosakit.demo``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from rosakit.demo.assets import fetch_model, fetch_plays
from rosakit.demo.recipe import Recipe
from rosakit.demo.run import run_demo
from rosakit.demo.texts import Split, plays, split, standard_library
from rosakit.errors import DataError, RosakitError
from rosakit.evaluate import EvaluationResult
from rosakit.report import gap_lines, plot_perplexity_and_needles, result_table
from rosakit.tuning.sources import load_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    try:
        if options.gpu:
            from rosakit.demo.gpu import run_gpu

            return _finish(run_gpu(options.cache, options.output, options.seed, console), options)
        return _finish(_small(options, console), options)
    except KeyboardInterrupt:
        console.print("\nstopped; run the same command again to go on from here")
        return 130
    except (RosakitError, ModuleNotFoundError) as error:
        if options.debug:
            raise
        print(f"rosakit demo: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rosakit.demo",
        description="What SmolLM2-135M loses in a window of 256 tokens, and what an exact token "
        "memory restores: train, measure against controls, table and plot. About ten minutes on "
        "two CPU cores; a second run reuses what is there.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="results")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/demo"), help="downloads and computed features"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--model", help="another model: a folder, a GGUF file or a hub name")
    parser.add_argument("--no-plays", action="store_true", help="source code only")
    parser.add_argument("--quick", action="store_true", help="a quarter of the work, to try it out")
    parser.add_argument(
        "--gpu", action="store_true", help="the longer recipe: LoRA and token route, needs a GPU"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _small(options: argparse.Namespace, console: Console) -> EvaluationResult:
    began = time.perf_counter()
    recipe = Recipe(seed=options.seed)
    if options.quick:
        recipe = replace(
            recipe, code_train=6, code_heldout=2, play_train=1, play_heldout=1, needle_samples=1,
            needle_lengths=(512, 1024),
        )  # fmt: skip
    name = options.model
    if name is None:
        name = str(fetch_model(options.cache, console.print))
    texts_of = {"code": standard_library()}
    if not options.no_plays:
        try:
            texts_of["plays"] = plays(fetch_plays(options.cache, console.print))
        except DataError as error:
            console.print(f"going on without plays: {error}")
    console.print(f"loading {name} in float32, {torch.get_num_threads()} threads")
    model, tokenizer = load_model(name, dtype="float32", device="cpu")
    sizes = {
        "code": (recipe.code_heldout, recipe.code_train),
        "plays": (recipe.play_heldout, recipe.play_train),
    }
    texts: dict[str, Split] = {}
    for kind, documents in texts_of.items():
        heldout, train = sizes[kind]
        texts[kind] = split(
            documents, tokenizer, length=recipe.length, heldout=heldout, train=train
        )
        console.print(
            f"{kind}: {train} files to train on, {heldout} others held out, the first "
            f"{recipe.length} tokens of each"
        )
    result = run_demo(
        recipe,
        model,
        tokenizer,
        texts,
        options.output,
        model_name=name,
        cache=options.cache / "features",
        console=console,
    )
    return replace(result, seconds=time.perf_counter() - began)


def _command() -> str:
    """How to call rosakit from here: `make demo` does not put its environment on the PATH."""
    if shutil.which("rosakit"):
        return "rosakit"
    return os.path.relpath(Path(sys.executable).with_name("rosakit"))


def _finish(result: EvaluationResult, options: argparse.Namespace) -> int:
    saved = result.save(options.output / "results.json")
    png, svg = plot_perplexity_and_needles(result, options.output / "results")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    first = next(iter(result.variants.values()))
    console.print(f"\n[bold]Held-out {result.settings.get('kind', 'files')}[/bold], by position")
    console.print(result_table(result))
    for kind in first.other:
        console.print(f"[bold]Held-out {kind}[/bold]")
        console.print(result_table(result, kind))
    for line in gap_lines(result):
        console.print(line)
    console.print(f"\n{result.seconds / 60:.1f} minutes on {result.environment.hardware['cpu']}")
    console.print(f"results: {saved}\nplot:    {png}\n         {svg}")
    console.print(f"try it:  {_command()} generate {options.output / 'rosa'} --prompt 'def main('")
    return 0


if __name__ == "__main__":
    sys.exit(main())
