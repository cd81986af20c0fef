"""Collect the runs of `benchmarks.addresses` into one JSON file, a table and a plot.

    python -m benchmarks.addresses.table out --json docs/results/addresses.json \
        --plot docs/results/addresses.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.addresses.variants import VARIANTS

HEALTH = (
    "next_token",
    "key_token",
    "beyond_window",
    "match_rate",
    "match_length",
    "entropy",
    "changed",
)


def collect(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant, in the order of `VARIANTS`, from runs of equal length.

    The share of the gap is taken within each seed: from the control of that seed, which is 0, to
    its ceiling, 1. ``late`` compares the last bucket of positions; ``net`` first subtracts what a
    variant gains over the control at the first positions, where nothing lies beyond the window.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], {})[run["seed"]] = run
    lengths = {run["tokens"] for seeds in by_name.values() for run in seeds.values()}
    if len(lengths) != 1:
        raise SystemExit(f"runs of different length cannot be compared: {sorted(lengths)} tokens")
    rows = []
    for name in [n for n in VARIANTS if n in by_name]:
        seeds = by_name[name]
        row: dict[str, Any] = {"variant": name, "what": next(iter(seeds.values()))["what"]}
        row["seeds"] = sorted(seeds)
        row["nats"] = {
            part: spread([run["heldout"][part] for run in seeds.values()])
            for part in next(iter(seeds.values()))["heldout"]
        }
        for kind in ("late", "net"):
            shares = [
                share_of_gap(run, by_name["control"][seed], by_name["ceiling"][seed], kind)
                for seed, run in seeds.items()
                if seed in by_name.get("control", {}) and seed in by_name.get("ceiling", {})
            ]
            row[kind] = spread(shares)
        for when in ("before", "after"):
            row[when] = health_of([run[when] for run in seeds.values() if run[when]])
        learned = [run["learned"] for run in seeds.values() if run.get("learned")]
        if learned:
            row["learned"] = mean_tables(learned)
        rows.append(row)
    return rows


def share_of_gap(
    run: dict[str, Any], control: dict[str, Any], ceiling: dict[str, Any], kind: str
) -> float:
    """How much of the way from the control to the ceiling a run has gone."""
    parts = list(control["heldout"])
    first, last = parts[0], parts[-1]

    def gain(of: dict[str, Any]) -> float:
        late = control["heldout"][last] - of["heldout"][last]
        early = control["heldout"][first] - of["heldout"][first]
        return float(late - early if kind == "net" else late)

    return gain(run) / gain(ceiling)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (0 for one) and the values themselves."""
    if not values:
        return {"mean": None, "sd": None, "values": []}
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}


def mean_tables(found: list[dict[str, dict[str, list[float]]]]) -> dict[str, list[float]]:
    """What learning added to each length, distance and rank, averaged over seeds and layers."""
    tables = [layer for run in found for layer in run.values()]
    return {
        name: [
            round(statistics.fmean(column), 4)
            for column in zip(*(t[name] for t in tables), strict=True)
        ]
        for name in tables[0]
    }


def health_of(found: list[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    """Each metric by layer, averaged over seeds."""
    if not found:
        return {}
    layers = list(found[0])
    return {
        name: [statistics.fmean(f[layer].get(name, 0.0) for f in found) for layer in layers]
        for name in HEALTH
        if name in found[0][layers[0]]
    }


def render(rows: list[dict[str, Any]]) -> str:
    """A markdown table."""
    parts = list(rows[0]["nats"])
    lines = [
        "| variant | seeds | "
        + " | ".join(f"nats {part}" for part in parts)
        + " | gap closed, late | net of 0–256 | next token, before → after |",
        "|---" * (len(parts) + 5) + "|",
    ]
    for row in rows:
        nats = [f"{row['nats'][part]['mean']:.4f}" for part in parts]
        cells = [f"`{row['variant']}`: {row['what']}", str(len(row["seeds"])), *nats]
        for kind in ("late", "net"):
            value = row[kind]
            sd = f" ± {100 * value['sd']:.1f}" if len(value["values"]) > 1 else ""
            cells.append("–" if value["mean"] is None else f"{100 * value['mean']:.1f}{sd} %")
        cells.append(
            " → ".join(f"{statistics.fmean(row[w]['next_token']):.3f}" for w in ("before", "after"))
            if row["after"]
            else "–"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of the gap with one dot a seed, and agreement of what is read, by layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in rows if r["variant"] not in ("control", "ceiling")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.5 * len(shown) + 2.2))
    for place, row in enumerate(reversed(shown)):
        for kind, shift, colour in (("late", 0.17, "#1f77b4"), ("net", -0.17, "#ff7f0e")):
            value = row[kind]
            if value["mean"] is None:
                continue
            left.barh(place + shift, 100 * value["mean"], height=0.32, color=colour, alpha=0.55)
            dots = [100 * v for v in value["values"]]
            left.plot(dots, [place + shift] * len(dots), "o", color=colour, markersize=4)
    left.set_yticks(range(len(shown)), [r["variant"] for r in reversed(shown)])
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel(
        "gap to full attention closed, % (blue: positions from 1k on;\n"
        "orange: net of the gain at positions 0–256). A dot is a seed."
    )
    taught = [r for r in shown if "next_token" in r["after"]]
    for number, row in enumerate(taught):
        colour = plt.get_cmap("tab20")(number % 20)
        after, before = row["after"]["next_token"], row["before"]["next_token"]
        right.plot(after, "o-", color=colour, label=row["variant"], markersize=4)
        if before != after:
            right.plot(before, ":", color=colour)
    right.set_xlabel("adapter, from the lowest layer (dotted: before training)")
    right.set_ylabel("the token read is the one that follows")
    right.set_ylim(0, 1)
    right.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what `benchmarks.addresses` wrote")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--command", default="python -m benchmarks.addresses", help="is recorded")
    parser.add_argument("--environment", default="{}", help="JSON; hardware and versions")
    options = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*-*.json"))]
    if not runs:
        raise SystemExit(f"no runs in {options.folder}")
    rows = collect(runs)
    print(render(rows))
    if options.json:
        found = {
            "command": options.command,
            "environment": json.loads(options.environment),
            "tokens": runs[0]["tokens"],
            "plan": runs[0]["plan"],
            "rows": rows,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
