"""The suites of `rosakit eval`: what is measured of every variant, in parts that can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rosakit.errors import InvalidInputError
from rosakit.evaluate.distance import perplexity_by_distance
from rosakit.evaluate.efficiency import efficiency
from rosakit.evaluate.grids import GridResult
from rosakit.evaluate.harness import harness
from rosakit.evaluate.needles import make_needles
from rosakit.evaluate.niah import measure_niah, niah_grid
from rosakit.evaluate.perplexity import perplexity, position_edges
from rosakit.evaluate.recall import copying, mqar
from rosakit.evaluate.results import (
    DistanceResult,
    Efficiency,
    VariantResult,
    niah_from,
    perplexity_from,
    write_json,
)
from rosakit.evaluate.scores import Progress, device_of, model_scorer
from rosakit.evaluate.short import make_short, measure_short

__all__ = ["SUITES", "Plan", "measure_variant"]

SUITES = (
    "perplexity",
    "distance",
    "niah",
    "niah_multi",
    "niah_confusable",
    "mqar",
    "mqar_lines",
    "short",
    "copying",
    "efficiency",
    "tasks",
)
"""By name: perplexity by position and by distance to repeated content; single, several and
confusable needles; many keys as bare tokens and as lines of text; short contexts; copies from far;
time and memory; tasks of lm-eval."""


@dataclass(frozen=True)
class Plan:
    """What is measured of every variant.

    Attributes:
        documents: held-out token ids by kind of text; the first kind is the main one.
        window, sink_tokens: what they hide counts as beyond, for all variants alike.
        length: tokens of the longest document.
        suites: names from `SUITES`; perplexity is always measured.
        lengths: of the prompts of recall tasks, tokens.
        depths: of needles, 0..1.
        samples: prompts a cell.
        pairs: of MQAR.
        haystack: text that needles hide in; None for neutral sentences.
        distractors: other needles beside the one asked for.
        tasks: of lm-eval.
        local: by task a local file with its data.
        limit: documents a task of lm-eval, and prompts a cell at most; None for no limit.
        seed: of everything random.
    """

    documents: Mapping[str, Sequence[Sequence[int]]]
    window: int
    sink_tokens: int
    length: int
    suites: tuple[str, ...] = ("perplexity", "niah")
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 2
    pairs: tuple[int, ...] = (4, 16)
    haystack: str | None = None
    distractors: int = 4
    tasks: tuple[str, ...] = ()
    local: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.suites if name not in SUITES]
        if unknown:
            raise InvalidInputError(
                f"no suite named {', '.join(unknown)}; there are {', '.join(SUITES)}"
            )
        if self.limit is not None and self.limit < 1:
            raise InvalidInputError(f"limit must be at least 1, got {self.limit}")

    @property
    def prompts(self) -> int:
        """Prompts a cell, after the limit."""
        return self.samples if self.limit is None else min(self.samples, self.limit)

    def digest(self) -> str:
        """Changes whenever a result would."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure_variant(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    *,
    trained: int = 0,
    description: str = "",
    parts: Path | None = None,
    progress: Progress | None = None,
) -> VariantResult:
    """Run a plan's suites on one model.

    Args:
        model: a causal language model, attached or not.
        tokenizer: its tokenizer.
        plan: what is measured.
        trained: parameters that training changed.
        description: what the variant is.
        parts: folder that keeps each finished suite, so that an interrupted evaluation goes on
            from there; None to keep nothing. It belongs to this variant and its weights.
        progress: called after each batch.
    """
    store = _Parts(parts, plan.digest())

    scored: dict[str, Any] = {}
    distances: dict[str, Any] = {}
    edges = [e for e in position_edges(plan.length, plan.window) if e <= plan.length]
    steps = [plan.window * 2**n for n in range(-2, 5) if 1 < plan.window * 2**n < plan.length]
    for kind, rows in plan.documents.items():
        by_position = partial(perplexity, model, rows, edges=edges, progress=progress)
        scored[kind] = store.get(f"perplexity {kind}", by_position)
        if "distance" in plan.suites:
            by_distance = partial(
                perplexity_by_distance,
                model,
                rows,
                [int(s) for s in steps] or [1],
                progress=progress,
            )
            distances[kind] = store.get(f"distance {kind}", by_distance)
    grids: dict[str, GridResult] = {}
    found: dict[str, Any] = {"niah": None, "efficiency": (), "tasks": {}, "short": {}}
    runs = _runs(model, tokenizer, plan, progress)
    for name in plan.suites:
        if name in runs:
            value = store.get(name, runs[name])
            if isinstance(value, GridResult):
                grids[name] = value
            else:
                found[name] = value
    kinds = list(scored)
    return VariantResult(
        scored[kinds[0]],
        found["niah"],
        trained,
        description,
        {kind: scored[kind] for kind in kinds[1:]},
        grids,
        distances,
        {**found["short"], **found["tasks"]},
        found["efficiency"],
    )


def _runs(
    model: Any, tokenizer: Any, plan: Plan, progress: Progress | None
) -> dict[str, Callable[[], Any]]:
    """What runs each suite but perplexity; suites that lack their settings are left out."""
    common: dict[str, Any] = {
        "window": plan.window,
        "sink_tokens": plan.sink_tokens,
        "seed": plan.seed,
        "progress": progress,
    }

    def needles(distractors: int, confusable: bool) -> Any:
        made = make_needles(
            tokenizer,
            plan.lengths,
            plan.depths,
            samples=plan.prompts,
            haystack=plan.haystack,
            distractors=distractors,
            confusable=confusable,
            seed=plan.seed,
        )
        scorer, device = model_scorer(model), device_of(model)
        return measure_niah(scorer, made, device=device, **common)["model"]

    def copied() -> GridResult:
        distances = [n - 64 for n in plan.lengths if n >= 128]
        rows = next(iter(plan.documents.values()))
        return copying(model, rows, distances, samples=plan.prompts, **common)

    runs: dict[str, Callable[[], Any]] = {}
    if plan.lengths:
        runs |= {
            "niah": lambda: needles(0, False),
            "niah_multi": lambda: niah_grid(needles(plan.distractors, False)),
            "niah_confusable": lambda: niah_grid(needles(plan.distractors, True)),
            "mqar": lambda: mqar(
                model, tokenizer, plan.lengths, plan.pairs, samples=plan.prompts, **common
            ),
            "mqar_lines": lambda: mqar(
                model,
                tokenizer,
                plan.lengths,
                plan.pairs,
                samples=plan.prompts,
                form="lines",
                **common,
            ),
            "copying": copied,
            "efficiency": lambda: efficiency(
                model,
                plan.lengths,
                ids=next(iter(plan.documents.values()))[0],
                seed=plan.seed,
                progress=progress,
            ),
        }
    runs["short"] = lambda: measure_short(
        model_scorer(model),
        make_short(tokenizer, plan.documents, count=plan.limit or 500, seed=plan.seed),
        device=device_of(model),
        progress=progress,
    )["model"]
    if plan.tasks:
        runs["tasks"] = lambda: harness(
            model,
            tokenizer,
            plan.tasks,
            local=plan.local,
            lengths=plan.lengths or (4096,),
            limit=plan.limit,
            seed=plan.seed,
        )
    return runs


class _Parts:
    """Finished suites of one variant, each in a file of its own.

    Args:
        folder: where they are kept; None to keep nothing.
        digest: of the plan; parts of another one are measured again.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self.folder, self.digest = folder, digest

    def get(self, name: str, run: Callable[[], Any]) -> Any:
        """The kept value, or what `run` measures."""
        if self.folder is None:
            return run()
        path = self.folder / f"{name.replace(' ', '-')}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["plan"] == self.digest:
                return _unpack(name, kept["value"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or cut off: measured again
        value = run()
        write_json(path, {"plan": self.digest, "value": _pack(name, value)})
        return value


def _pack(name: str, value: Any) -> Any:
    if name == "efficiency":
        return [asdict(entry) for entry in value]
    return value if isinstance(value, dict) else asdict(value)


def _unpack(name: str, value: Any) -> Any:
    if name.startswith("perplexity"):
        return perplexity_from(value)
    if name.startswith("distance"):
        return DistanceResult.from_dict(value)
    if name == "niah":
        return niah_from(value)
    if name == "efficiency":
        return tuple(Efficiency(**entry) for entry in value)
    return value if name in ("tasks", "short") else GridResult.from_dict(value)
