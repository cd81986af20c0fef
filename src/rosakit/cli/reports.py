"""`rosakit inspect` and `rosakit report`: pages to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["inspect", "report"]


def inspect(
    model: Annotated[
        str, typer.Argument(help="Result of rosakit tune, saved adapter, or plain model.")
    ],
    file: Annotated[Path, typer.Option(help="Text to read; - for standard input.")] = Path("-"),
    output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("inspect.html"),
    figures: Annotated[
        bool, typer.Option("--figures", help="Also write figures beside the page, PNG and SVG.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens read; the rest is left out.")] = 2048,
    routes: Annotated[int, typer.Option(help="Single routes shown of each adapter.")] = 3,
    window: Annotated[
        int, typer.Option(help="Window of a plain model, which gets an untrained token route.")
    ] = 256,
    base: Annotated[
        str | None, typer.Option(help="Base model of a saved adapter, or of a result if it moved.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Show what each position of a text recalled, as one HTML page without network."""
    from rosakit.cli.app import read_text
    from rosakit.evaluate.environment import describe_environment
    from rosakit.evaluate.inspection import inspect_text
    from rosakit.report import plot_inspection, write_inspection
    from rosakit.tuning import RosaConfig, attach, is_attached
    from rosakit.tuning.result import load_any

    text = read_text(None, file)
    loaded, tokenizer = load_any(model, base=base, dtype=dtype, device=device)
    settings = {"model": Path(model).name, "text": file.name}
    if not is_attached(loaded):
        config = RosaConfig(window=window, adapters=False, token_route=True)
        attach(loaded, config)
        settings["token route"] = "untrained"
    found = describe_environment()
    settings |= {"rosakit": found.versions["rosakit"], "date": found.date}
    inspection = inspect_text(
        loaded, tokenizer, text, max_tokens=max_tokens, routes=routes, settings=settings
    )
    typer.echo(write_inspection(inspection, output, f"What {Path(model).name} recalled"))
    if figures:
        for path in plot_inspection(inspection, output.with_suffix("")):
            typer.echo(path)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Results of rosakit eval (JSON), or folders that hold an evaluation.json.",
            metavar="RESULT…",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The HTML page.")] = Path("report.html"),
    png: Annotated[
        bool, typer.Option("--png", help="Also write the curves and needle maps as PNG and SVG.")
    ] = False,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Runs compared",
) -> None:
    """Compare results: curves, tables and needle maps side by side in one HTML page."""
    from rosakit.report import compare_results, load_named, plot_comparison

    named = load_named(results)
    typer.echo(compare_results(named, output, title=title))
    if png:
        for path in plot_comparison(named, output.with_suffix("")):
            typer.echo(path)
