"""Run the registered cases and write JSON, a table and a scaling plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("ROSAKIT_NUM_THREADS", "1")

import numpy as np
import torch

import rosakit
from benchmarks.cpu.registry import CASES, Figure, Plan
from rosakit import native

QUICK = Plan(
    lengths=(1024, 4096), long=16384, contexts=(1024,), routes=32, repeats=1,
    families=("iid", "mk", "constant", "fibonacci"),
)  # fmt: skip


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    """The checkout's commit, with a mark for changes on top; empty outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(figures: list[Figure]) -> str:
    """Markdown: one row a case and family, one column a length."""
    lengths = sorted({f.where["T"] for f in figures})
    rows: dict[tuple[str, ...], dict[int, float]] = {}
    for f in figures:
        key = (f.case, f.where.get("family", ""), str(f.where.get("bits", "")), f.unit)
        rows.setdefault(key, {})[f.where["T"]] = f.value
    out = ["| case | stream | bits | unit | " + " | ".join(f"T={n}" for n in lengths) + " |"]
    out.append("|" + "---|" * (4 + len(lengths)))
    for key, cells in rows.items():
        shown = [f"{cells[n]:.4g}" if n in cells else "" for n in lengths]
        out.append("| " + " | ".join((*key, *shown)) + " |")
    return "\n".join(out)


def growth(figures: list[Figure], case: str) -> dict[str, float]:
    """Exponent of total time against T between the shortest and the longest stream, by family."""
    out = {}
    for family in sorted({f.where["family"] for f in figures if f.case == case}):
        cells = {
            f.where["T"]: f.value
            for f in figures
            if f.case == case and f.where["family"] == family and f.where.get("bits") == 4
        }
        short, long = min(cells), max(cells)
        if long > short:
            out[family] = 1 + float(np.log(cells[long] / cells[short]) / np.log(long / short))
    return out


def plot(figures: list[Figure], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("match", "whole sequence"),
        ("match_counterfactual", "whole sequence + 4 flips"),
        ("prefill", "streaming memory, prefill"),
        ("state", "streaming memory, size"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.6), sharex=True)
    families = list(dict.fromkeys(f.where["family"] for f in figures if f.case == "match"))
    colours = plt.get_cmap("tab20").colors
    for axis, (case, title) in zip(axes, panels, strict=True):
        for number, family in enumerate(families):
            points = sorted(
                (f.where["T"], f.value)
                for f in figures
                if f.case == case and f.where["family"] == family and f.where["bits"] == 4
            )
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    ms=3,
                    label=family,
                    color=colours[number],
                )
        axis.set(title=title, xlabel="symbols a stream", xscale="log")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ns of CPU a symbol (one thread)")
    axes[3].set_ylabel("bytes a symbol")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    parser.add_argument(
        "--peers", type=Path, help="folder with peers' packages, beside installed ones"
    )
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers))
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    native.set_num_threads(1)
    plan = QUICK if options.quick else Plan()
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    for name in options.cases or CASES:
        print(f"{name}: {CASES[name].__doc__}", flush=True)
        start = time.monotonic()
        for f in CASES[name](plan):
            figures.append(f)
            print(f"  {f.case} {f.where}: {f.value:.4g} {f.unit}", flush=True)
        seconds[name] = round(time.monotonic() - start, 1)
    print(table(figures))
    exponents = {c: growth(figures, c) for c in ("match", "match_counterfactual", "prefill")}
    exponents = {c: e for c, e in exponents.items() if e}
    print(json.dumps(exponents, indent=1))
    if options.out:
        result = {
            "hardware": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
            "versions": {
                "rosakit": rosakit.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "date": date.today().isoformat(),
            "commit": commit(),
            "load": [round(x, 2) for x in os.getloadavg()],
            "command": " ".join(
                ["python -m benchmarks.cpu"]
                + ["FOLDER" if a == str(options.peers) else a for a in sys.argv[1:]]
            ),
            "seconds": seconds,
            "growth_exponent": exponents,
            "figures": [
                {"case": f.case, "value": round(f.value, 4), "unit": f.unit, **f.where}
                for f in figures
            ],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        if exponents:
            plot(figures, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
