"""The demo itself: train token routes on a frozen, windowed model, and measure all variants.

Three routes are trained alike: "rosa" retrieves, "control" has every retrieved token replaced by
the position's own, and "full+trained" retrieves beside full attention (the ceiling).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rosakit.demo.recipe import Recipe
from rosakit.demo.texts import Split
from rosakit.errors import CheckpointError
from rosakit.evaluate import (
    EvaluationResult,
    VariantResult,
    describe_environment,
    make_needles,
    position_edges,
)
from rosakit.evaluate.progress import showing
from rosakit.evaluate.variants import Measurement, Task, measure_routes, measure_whole, route_of
from rosakit.layers import TokenRoute
from rosakit.tuning import RosaConfig, attach, detach, is_attached
from rosakit.tuning.data import DataConfig
from rosakit.tuning.fit_route import RouteFit, fit_token_route
from rosakit.tuning.result import load_trained, save_trained
from rosakit.tuning.settings import TuneConfig

__all__ = ["run_demo"]

_DESCRIPTIONS = {
    "full": "full attention, untrained",
    "full+trained": "full attention, token route trained alike: the ceiling",
    "window": "window without sinks, untrained",
    "window+sinks": "window and sinks, untrained",
    "control": "window and sinks, same training, nothing retrieved",
    "rosa": "window and sinks, token route",
}


def run_demo(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Split],
    output: Path,
    *,
    model_name: str,
    cache: Path,
    console: Console,
) -> EvaluationResult:
    """Train and measure; what the frozen model computed is kept in `cache` and reused.

    Args:
        recipe: sizes and rates.
        model, tokenizer: a plain causal language model; it comes back as it was.
        texts: by kind, the main one first.
        output: folder of the trained routes, each as a folder that `rosakit generate` reads.
        model_name: where the model was loaded from.
        cache: folder of the features.
        console: where progress is shown.
    """
    began = time.perf_counter()
    model.requires_grad_(False)
    blocks = [{"input_ids": ids} for part in texts.values() for ids in part.train]
    training = TuneConfig(
        model=model_name,
        data=DataConfig(heldout_share=0.0),
        length=recipe.length,
        steps=recipe.steps,
        lr_token_route=recipe.lr,
        seed=recipe.seed,
        dtype="float32",
    )
    routes: dict[str, TokenRoute] = {}
    fits: dict[str, RouteFit] = {}
    plans = {
        "rosa": recipe.attached(),
        "control": recipe.attached(retrieve=False),
        "full+trained": recipe.attached(window=False),
    }
    console.print("\n[bold]Training[/bold]", highlight=False)
    for name, plan in plans.items():
        folder = output / name
        settings = dataclasses.replace(training, rosa=plan, output=str(folder))
        routes[name], fits[name] = _train(
            name, plan, recipe, model, blocks, folder, settings, cache, console
        )
    trained = time.perf_counter()

    console.print("\n[bold]Evaluation[/bold]", highlight=False)
    task = _task(recipe, tokenizer, texts)
    found: dict[str, Measurement] = {}
    groups: list[tuple[str, RosaConfig, dict[str, TokenRoute | None]]] = [
        (
            "window+sinks",
            plans["rosa"],
            {"window+sinks": None, "control": routes["control"], "rosa": routes["rosa"]},
        ),
        (
            "full attention",
            plans["full+trained"],
            {"full": None, "full+trained": routes["full+trained"]},
        ),
        ("bare window", recipe.attached(sinks=False), {"window": None}),
    ]
    for label, plan, members in groups:
        with showing(console, prefix=f"{label}: ") as progress:
            found |= measure_routes(model, plan, members, task, cache=cache, progress=progress)
    _verify(model, output / "rosa", plans["rosa"], routes["rosa"], task, cache, console)
    kinds = list(texts)
    sizes = {name: sum(p.numel() for p in route.parameters()) for name, route in routes.items()}
    variants = {
        name: VariantResult(
            found[name].perplexity[kinds[0]],
            found[name].niah,
            sizes.get(name, 0),
            description,
            {kind: found[name].perplexity[kind] for kind in kinds[1:]},
        )
        for name, description in _DESCRIPTIONS.items()
    }
    now = time.perf_counter()
    return EvaluationResult(
        variants,
        describe_environment(),
        recipe.seed,
        now - began,
        {
            "name": model_name if "/" not in model_name else Path(model_name).stem,
            "kind": kinds[0],
            "window": recipe.window,
            "sink_tokens": recipe.sink_tokens,
            "recipe": recipe.to_dict(),
            "seconds_training": round(trained - began, 1),
            "seconds_evaluation": round(now - trained, 1),
            "training": {name: dataclasses.asdict(fit) for name, fit in fits.items()},
            "files": {
                kind: {"train": part.train_names, "heldout": part.heldout_names}
                for kind, part in texts.items()
            },
        },
    )


def _train(
    name: str,
    plan: RosaConfig,
    recipe: Recipe,
    model: Any,
    blocks: list[dict[str, Tensor]],
    folder: Path,
    settings: TuneConfig,
    cache: Path,
    console: Console,
) -> tuple[TokenRoute, RouteFit]:
    """Train one route, save it, and return a copy of it."""
    torch.manual_seed(recipe.seed)  # all routes start from the same numbers
    attach(model, plan)
    try:
        with showing(console, prefix=f"{name}: ") as progress:
            fit = fit_token_route(
                model,
                blocks,
                steps=recipe.steps,
                batch_tokens=recipe.batch_tokens,
                lr=recipe.lr,
                seed=recipe.seed,
                cache=cache,
                progress=progress,
            )
        save_trained(model, folder, settings)
        console.print(
            f"{name}: training loss {fit.before:.4f} -> {fit.after:.4f} on {fit.tokens:,} tokens",
            highlight=False,
        )
        return route_of(model), fit
    finally:
        detach(model)


def _task(recipe: Recipe, tokenizer: Any, texts: Mapping[str, Split]) -> Task:
    # Needles hide in the last kind of text (prose, if there is any), among held-out words.
    hay = list(texts.values())[-1].heldout_text
    needles = make_needles(
        tokenizer,
        recipe.needle_lengths,
        recipe.needle_depths,
        samples=recipe.needle_samples,
        haystack=hay[: 64 * max(recipe.needle_lengths)],
        seed=recipe.seed,
    )
    return Task(
        {kind: part.heldout for kind, part in texts.items()},
        needles,
        recipe.window,
        position_edges(recipe.length, recipe.window),
        sink_tokens=recipe.sink_tokens,
        seed=recipe.seed,
    )


def _verify(
    model: Any,
    folder: Path,
    plan: RosaConfig,
    route: TokenRoute,
    task: Task,
    cache: Path,
    console: Console,
) -> None:
    """Measure one file again with the saved route through the whole model, nothing shared."""
    kind, documents = next(iter(task.documents.items()))
    one = Task({kind: documents[:1]}, (), task.window, task.edges)
    expected = measure_routes(model, plan, {"rosa": route}, one, cache=cache)["rosa"]
    try:
        load_trained(model, folder)
        whole = measure_whole(model, "rosa", one)["rosa"]
    finally:
        if is_attached(model):
            detach(model)
    ours, theirs = (x.perplexity[kind].ppl for x in (whole, expected))
    if abs(ours / theirs - 1) > 1e-3:
        raise CheckpointError(
            f"the model saved in {folder} has perplexity {ours:.4f} on a file where the trained "
            f"one had {theirs:.4f}; this is a defect of rosakit, please report it"
        )
    console.print(
        f"checked: the saved model, loaded and run as a whole, agrees ({ours:.4f})",
        highlight=False,
    )
