"""The commands. Heavy packages are imported when a command runs, so that help is quick."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rosakit.cli.flags import merge, with_flags
from rosakit.cli.reports import inspect, report

__all__ = ["build", "read_text"]


def build() -> typer.Typer:
    """The command line as a callable."""
    from rosakit.models.rwkv8.cli import rwkv8_app

    app = typer.Typer(
        help="Long-range memory for windowed language models.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Rich's tables cut long flag names off in 80 columns.
        rich_markup_mode=None,
        add_completion=False,
    )
    app.callback()(_options)
    app.command()(with_flags(tune))
    app.command("eval")(evaluate)
    app.command()(generate)
    app.command()(inspect)
    app.command()(report)
    app.command()(info)
    app.add_typer(rwkv8_app, name="rwkv8")
    return app


def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error."),
    ] = False,
) -> None:
    """Long-range memory for windowed language models."""
    if version:
        import rosakit

        typer.echo(rosakit.__version__)
        raise typer.Exit


def tune(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file with the fields below; flags override it.", metavar="FILE"),
    ] = None,
    *,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameters, memory, steps and time; train nothing."),
    ] = False,
    flags: dict[str, Any],
) -> None:
    """Train a long-range memory for a pretrained model on local text.

    Ctrl-C stops after the running step and leaves a checkpoint; --resume goes on from it.
    """
    from rosakit.errors import InvalidInputError
    from rosakit.tuning.settings import load_config

    run = merge({} if config is None else load_config(config), flags)
    if not run.model:
        raise InvalidInputError("no model: give --model, or a configuration file with one")
    if dry_run:
        from rosakit.tuning.plan import plan_run

        typer.echo("\n".join(plan_run(run).lines()))
        return
    from rosakit.tuning.parallel import first_process
    from rosakit.tuning.result import RUN_FILE
    from rosakit.tuning.train import tune as train

    result, speaks = train(run, show=not quiet), first_process()
    if result.interrupted:
        # What was saved holds every flag, with names that are good from anywhere.
        saved = shlex.quote(str(result.output.expanduser().absolute() / RUN_FILE))
        if speaks:
            typer.echo(
                f"stopped at step {result.steps}; go on with: rosakit tune {saved} --resume",
                err=True,
            )
        raise typer.Exit(130)
    if not speaks:
        return
    loss, heldout = result.metrics["train_loss"], result.metrics["heldout_loss"]
    shown = "" if heldout is None else f", held-out loss {heldout:.4f}"
    typer.echo(f"{result.output}: {result.steps} steps, training loss {loss:.4f}{shown}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Output folder of rosakit tune.")],
    control: Annotated[
        Path | None, typer.Option(help="Output folder of the same run with --control.")
    ] = None,
    full: Annotated[
        Path | None, typer.Option(help="Output folder of a run with full attention, trained alike.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; the run's folder by default.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Texts to measure; the run's held-out ones by default.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens measured of each document.")] = 2048,
    documents: Annotated[int, typer.Option(help="Documents measured.")] = 8,
    niah: Annotated[
        str, typer.Option(help="Lengths of the needle prompts in tokens, or none.", metavar="N,N,…")
    ] = "512,1024,2048",
    depths: Annotated[
        str, typer.Option(help="Where needles stand, 0 (start) to 1.", metavar="X,X,…")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Prompts in each cell of a recall task.")] = 2,
    suites: Annotated[
        str,
        typer.Option(
            help="What is measured: perplexity, distance, niah, niah_multi, niah_confusable, mqar, "
            "mqar_lines, short, copying, efficiency, tasks.",
            metavar="NAME,…",
        ),
    ] = "perplexity,niah",
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, for the suite of that name.", metavar="NAME,…")
    ] = "",
    local: Annotated[
        list[str] | None,
        typer.Option(help="A local file with the data of a task.", metavar="TASK=FILE"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="At most this many documents, prompts a cell and documents a task."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Measure a trained model against full attention, bare windows and its control.

    What is finished is kept: the same command goes on where an interrupted one stopped.
    """
    from rich.console import Console

    from rosakit.cli.evaluation import publish
    from rosakit.errors import InvalidInputError
    from rosakit.evaluate.progress import showing
    from rosakit.evaluate.runs import evaluate_runs

    if output is not None:  # before anything is measured: a folder that cannot be written shows
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInputError(
                f"cannot write results into {output}: {error.strerror}; choose another --output"
            ) from error
    with showing(Console(stderr=True, highlight=False)) as progress:
        result = evaluate_runs(
            run,
            control=control,
            full=full,
            base=base,
            sources=data or None,
            length=length,
            documents=documents,
            niah_lengths=_numbers("niah", niah, int),
            depths=_numbers("depths", depths, float),
            samples=samples,
            suites=_names(suites),
            tasks=_names(tasks),
            local=_pairs(local or []),
            limit=limit,
            dtype=dtype,
            device=device,
            seed=seed,
            parts=(run if output is None else output) / "evaluation.parts",
            progress=progress,
        )
    publish(result, run if output is None else output)


def generate(
    model: Annotated[
        str, typer.Argument(help="Result of rosakit tune, saved adapter, or plain model.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - for standard input.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of a saved adapter, or of a result if it moved.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Probability mass that is sampled from.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Tokens that are sampled from; 0 for all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Use the model's chat template; without a prompt, talk at the terminal.",
        ),
    ] = False,
    session: Annotated[
        Path | None,
        typer.Option(help="File that keeps text and decoding state between calls.", metavar="FILE"),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that are read at once.")
    ] = 4096,
    prompt_lookup: Annotated[
        int, typer.Option(help="Tokens guessed from earlier text and checked at once; 0 for none.")
    ] = 0,
    stream: Annotated[bool, typer.Option(help="Write text as it is made.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory", help="Report the decoding state's memory.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Stream text from a trained model."""
    talking = chat and prompt is None and file is None and sys.stdin.isatty()
    text = None if talking else read_text(prompt, file)
    from rosakit.cli.generation import converse
    from rosakit.tuning.conversation import Conversation, Sampling
    from rosakit.tuning.result import load_any

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        prompt_lookup=prompt_lookup,
    )
    loaded, tokenizer = load_any(model, base=base, dtype=dtype, device=device)
    talk = Conversation(loaded, tokenizer, chat=chat, prefill_chunk=prefill_chunk)
    converse(talk, text, sampling, session=session, stream=stream, memory=memory)


def info(
    model: Annotated[
        str | None, typer.Argument(help="Result of rosakit tune, to plan its memory.")
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of context that the plan is made for.")
    ] = 131072,
    batch: Annotated[int, typer.Option(help="Rows that the plan is made for.")] = 1,
    base: Annotated[str | None, typer.Option(help="Base model, if it has moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report versions, backends, threads and GPU, or what decoding with a model will hold."""
    from rosakit.cli.info import collect, planned, show

    if model is not None:
        plan = planned(model, context, batch, base)
        typer.echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
        return
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


def read_text(prompt: str | None, file: Path | None) -> str:
    """The text that a command was given, from a flag, a file or standard input."""
    from rosakit.errors import DataError, InvalidInputError

    if prompt is not None and file is not None:
        raise InvalidInputError("give --prompt or --file, not both")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise InvalidInputError("no prompt: give --prompt, --file, or text on standard input")
    try:
        if file is None or str(file) == "-":
            return sys.stdin.read()
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file or 'standard input'} is not UTF-8 text") from error


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _pairs(values: list[str]) -> dict[str, str]:
    from rosakit.errors import InvalidInputError

    wrong = [value for value in values if "=" not in value]
    if wrong:
        raise InvalidInputError(f"--local takes TASK=FILE, got {wrong[0]!r}")
    return dict(value.split("=", 1) for value in values)


def _numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    from rosakit.errors import InvalidInputError

    if text.strip().lower() in ("", "none"):
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidInputError(f"--{name} takes numbers with commas, got {text!r}") from error
