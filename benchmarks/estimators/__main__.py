"""Every estimator on equal terms.

    python -m benchmarks.estimators fit|mqar|synonyms|count|agree --out estimators.json
    python -m benchmarks.estimators work --seconds 300 --processes 12 --work FOLDER --out FILE
    python -m benchmarks.estimators merge --out docs/results/estimators.json --files A.json B.json
    python -m benchmarks.estimators table|plot --out docs/results/estimators.json
    python -m benchmarks.estimators page --out docs/results/estimators.json

`work` fills a number of seconds with the trainings of the plan (`plan.py`), the most important
first, several processes on each GPU; what is finished is kept in the folder and put into the file.
`page` writes the tables into docs/estimators/comparison.md. `--small` runs the same code in seconds
on a CPU. A result replaces the one of the same training and keeps the others; the file is written
after every finished run, so that an interrupted part keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimators import page, pool, results, work
from benchmarks.estimators.parts import PARTS
from benchmarks.estimators.plan import plain
from benchmarks.estimators.tables import table
from benchmarks.estimators.variants import VARIANTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "work", "merge", "table", "plot", "page"])
    parser.add_argument("--files", nargs="+", type=Path, default=[], help="what is merged")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--work", type=Path, help="folder of finished trainings")
    parser.add_argument("--seconds", type=float, default=300, help="that `work` fills")
    parser.add_argument("--processes", type=int, default=1, help="of `work`, GPUs in turn")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    args = parser.parse_args(arguments)
    if args.part == "plot":
        from benchmarks.estimators.plot import plot

        for path in plot(results.read(args.out)["parts"], args.out):
            print(path)
        return 0
    if args.part == "table":
        for name, part in results.read(args.out)["parts"].items():
            dates = sorted({run["environment"]["date"][:10] for run in part["runs"]})
            print(f"{name}: {', '.join(dates)}\n\n{table(name, part['rows'])}\n")
        return 0
    if args.part == "page":
        page.write(page.COMPARISON, page.tables(args.out))
        print(page.COMPARISON)
        return 0
    if args.part == "merge":
        results.merge(args.out, args.files)
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.part == "work":
        if args.work is None:
            parser.error("work needs --work FOLDER for what is finished")
        work.fill(args.work, args.seconds, args.processes, device, args.seeds, args.small)
        command = (
            f"python -m benchmarks.estimators work --seconds {args.seconds:g} "
            f"--processes {args.processes} --device {device} --seeds {args.seeds}"
        )
        print(f"{work.gather(args.work, args.out, command)} trainings of the plan are finished")
        return 0
    jobs = PARTS[args.part](args.variants, args.seeds, device, args.small)
    settings = settings_of(jobs)
    command = f"python -m benchmarks.estimators {args.part} --device {device} --seeds {args.seeds}"
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for row in pool.results(jobs, args.workers):
        rows.append(row)
        shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
        print(f"{time.perf_counter() - begin:6.0f} s {len(rows)}/{len(jobs)} {shown}", flush=True)
        results.add(args.out, args.part, command, settings, in_order(rows, jobs))
    print(table(args.part, in_order(rows, jobs)))
    return 1 if any("error" in row for row in rows) else 0


def settings_of(jobs: list[pool.Job]) -> dict[str, Any]:
    """Everything that all jobs share, and the variants' definitions."""
    shared = dict(jobs[0][1])
    for _, arguments in jobs:
        shared = {k: v for k, v in shared.items() if arguments.get(k) == v}
    named = {arguments["variant"]: VARIANTS[arguments["variant"]] for _, arguments in jobs}
    return {**plain(shared), "variants": plain(named)}


def in_order(rows: list[dict[str, Any]], jobs: list[pool.Job]) -> list[dict[str, Any]]:
    """Rows in the order of their variants in the table of variants, then as they came."""
    order = list(VARIANTS)
    return sorted(rows, key=lambda row: (order.index(row["variant"]), row.get("seed", 0)))


if __name__ == "__main__":
    sys.exit(main())
