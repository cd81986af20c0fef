"""From single runs to results: one JSON a seed, and a summary with means and spreads."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import Planned
from rosakit.evaluate import EvaluationResult, VariantResult, describe_environment
from rosakit.evaluate.environment import Environment
from rosakit.evaluate.results import write_json

__all__ = ["collect", "summarise", "write_run"]

FLOOR, CEILING = "control", "full+trained"
"""What counts as 0 and as 100 percent of a gap: the same training without retrieval, and with full
attention."""


def write_run(
    path: Path,
    variant: VariantResult,
    planned: Planned,
    training: Mapping[str, Any],
    sizes: Mapping[str, Any],
    tasks: Mapping[str, Any],
) -> None:
    """One run: its arm, seed, training, and everything measured."""
    environment = dataclasses.asdict(describe_environment())
    write_json(
        path,
        {
            "arm": planned.arm,
            "seed": planned.seed,
            "training": dict(training),
            "sizes": dict(sizes),
            "tasks": dict(tasks),
            "environment": environment,
            "variant": variant.to_dict(),
        },
    )


def collect(work: Path, output: Path, *, model: str) -> dict[str, Any]:
    """Read all runs of a folder; write ``w<window>-seed<n>.json`` and ``summary.json``."""
    found = [json.loads(p.read_text()) for p in sorted((work / "runs").glob("*.json"))]
    # What ran out of time was not trained alike.
    runs = [r for r in found if r["training"].get("tokens") == r["training"].get("tokens_planned")]
    if not runs:
        raise SystemExit(f"no finished runs in {work / 'runs'}; run an arm first")
    usual = statistics.mode(r["sizes"]["tokens"] for r in runs)
    for r in runs:
        if r["sizes"]["tokens"] != usual:
            r["arm"] += f"@{r['sizes']['tokens'] / 1e6:g}M"
    names = json.loads((work / "names.json").read_text())
    summary: dict[str, Any] = {"model": model, "texts": names, "windows": {}}
    for window in sorted({run["sizes"]["window"] for run in runs}):
        here = [run for run in runs if run["sizes"]["window"] == window]
        seeds = sorted({run["seed"] for run in here})
        results = []
        for seed in seeds:
            # Untrained arms do not depend on the seed: the first one stands for all.
            chosen = {r["arm"]: r for r in here if "tokens" not in r["training"]}
            chosen |= {r["arm"]: r for r in here if r["seed"] == seed and "tokens" in r["training"]}
            results.append(_result(model, window, seed, chosen))
            results[-1].save(output / f"w{window}-seed{seed}.json")
        summary["windows"][str(window)] = summarise(results)
    first = next((r for r in runs if r["sizes"]["tokens"] == usual), runs[0])
    summary["not_finished"] = len(found) - len(runs)
    summary |= {k: first["environment"][k] for k in ("hardware", "versions", "date", "commit")}
    summary["sizes"], summary["tasks"] = first["sizes"], first["tasks"]
    summary["runs"] = [
        {k: run[k] for k in ("arm", "seed")}
        | {"window": run["sizes"]["window"], "commit": run["environment"]["commit"]}
        | {
            k: run["training"].get(k)
            for k in ("tokens", "seconds", "seconds_measuring", "extra_keys", "losses")
        }
        for run in runs
    ]
    write_json(output / "summary.json", summary)
    return summary


def _result(
    model: str, window: int, seed: int, runs: Mapping[str, Mapping[str, Any]]
) -> EvaluationResult:
    first = next(iter(runs.values()))
    seconds = sum(run["training"].get("seconds", 0.0) for run in runs.values())
    return EvaluationResult(
        {arm: VariantResult.from_dict(run["variant"]) for arm, run in runs.items()},
        Environment(**first["environment"]),
        seed,
        seconds,
        {"name": model, "kind": "code", "window": window, "sink_tokens": first["tasks"]["sinks"],
         "training": {arm: run["training"].get("tokens", 0) for arm, run in runs.items()}},
    )  # fmt: skip


def summarise(results: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Mean and spread over the seeds of every arm.

    Returns:
        By arm: perplexity by position of each kind of text, share of the gap between control and
        ceiling that is closed at late positions (in nats, from four windows on), recall beyond the
        window, and the change against the control near and far.
    """
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(name for result in results for name in result.variants):
        having = [r for r in results if arm in r.variants]
        variants = [r.variants[arm] for r in having]
        window = int(having[0].settings["window"])
        kinds = {"code": None, **{kind: kind for kind in variants[0].other}}
        entry: dict[str, Any] = {
            "what": variants[0].description,
            "trained_parameters": variants[0].trained_parameters,
            "seeds": [r.seed for r in having] if variants[0].trained_parameters else [],
            "perplexity": {},
            "gap_closed": {},
            "against_control": {},
        }
        for kind, key in kinds.items():
            labels = [b.label for b in _of(variants[0], key).buckets if b.tokens]
            entry["perplexity"][kind] = {
                label: _spread([_of(v, key).ppl_by_position[label] for v in variants])
                for label in labels
            }
            closed, near, far = [], [], []
            # A longer run is compared with a control and a ceiling trained as long.
            suffix = arm[arm.index("@") :] if "@" in arm else ""
            floor, ceiling = FLOOR + suffix, CEILING + suffix
            for result in having:
                if not {floor, ceiling} <= result.variants.keys():
                    continue
                low, high = (_late(result.variants[n], key, window) for n in (ceiling, floor))
                here = _late(result.variants[arm], key, window)
                closed.append((high - here) / (high - low))
                first = [_of(result.variants[n], key).buckets[0] for n in (arm, floor)]
                near.append(math.log(first[0].ppl / first[1].ppl))
                far.append(here - high)
            if closed:
                entry["gap_closed"][kind] = _spread(closed)
                entry["against_control"][kind] = {
                    "inside_window_nats": _spread(near), "late_nats": _spread(far),
                }  # fmt: skip
        entry["recall_beyond_window"] = _recall(variants)
        entry["short"] = {
            task: _spread([v.scores[task] for v in variants]) for task in variants[0].scores
        }
        arms[arm] = entry
    return {"arms": arms}


def _of(variant: VariantResult, kind: str | None) -> Any:
    return variant.perplexity if kind is None else variant.other[kind]


def _late(variant: VariantResult, kind: str | None, window: int) -> float:
    """Mean loss in nats of tokens with at least four windows before them."""
    late = [b for b in _of(variant, kind).buckets if b.start >= 4 * window] or [
        _of(variant, kind).buckets[-1]
    ]
    return float(sum(b.nll for b in late) / sum(b.tokens for b in late))


def _recall(variants: Sequence[VariantResult]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if variants[0].niah is not None:
        found["niah"] = _spread([_share(v.niah, lambda g: g.accuracy_beyond) for v in variants])
    for name in variants[0].grids:
        grids = [v.grids[name] for v in variants if name in v.grids]
        found[name] = _spread([_share(g, lambda g: g.accuracy_beyond) for g in grids])
    return found


def _share(grid: Any, value: Callable[[Any], float]) -> float:
    share = value(grid)
    return 0.0 if math.isnan(share) else share


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and the values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }
