"""Plots of docs/results/gpu.json: time and memory against the length of the stream.

python benchmarks/gpu/plot.py docs/results/gpu.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

FAMILIES = {"random": "#1f77b4", "repeats": "#2ca02c", "constant": "#9467bd"}
ATTENTION = {"windowed": ("#d62728", "-"), "full": ("#7f7f7f", "--")}


def series(rows: list[dict[str, Any]], field: str, **where: str) -> tuple[list[int], list[float]]:
    chosen = [r for r in rows if all(r[k] == v for k, v in where.items()) and field in r]
    chosen.sort(key=lambda r: r["T"])
    return [r["T"] for r in chosen], [r[field] for r in chosen]


def finish(axis: plt.Axes, title: str, unit: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = [2**n for n in range(11, 18)]
    axis.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
    axis.set_xlabel("positions T")
    axis.set_ylabel(unit)
    axis.set_title(title)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def main() -> None:
    source = Path(sys.argv[1])
    report = json.loads(source.read_text())
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")

    for name, colour in FAMILIES.items():
        axes[0].plot(
            *series(report["match"], "forward_ms", stream=name),
            color=colour,
            marker="o",
            label=f"match, {name}",
        )
    for kind, (colour, style) in ATTENTION.items():
        axes[0].plot(
            *series(report["attention"], "forward_ms", kind=kind),
            color=colour,
            linestyle=style,
            marker="s",
            label=f"{kind} attention",
        )
        axes[1].plot(
            *series(report["attention"], "forward_backward_ms", kind=kind),
            color=colour,
            linestyle=style,
            marker="s",
            label=f"{kind} attention",
        )
    axes[1].plot(
        *series(report["step"], "forward_backward_ms"),
        color="#1f77b4",
        marker="o",
        label="ROSA: match, flips, read, backward",
    )
    scale = 1 << 20
    lengths, extra = series(report["step"], "extra_bytes")
    _, given = series(report["step"], "qkv_bytes")
    axes[2].plot(lengths, [x / scale for x in extra], color="#1f77b4", marker="o", label="ROSA")
    axes[2].plot(lengths, [x / scale for x in given], color="#7f7f7f", ls=":", label="q + k + v")
    lengths, extra = series(report["attention"], "extra_bytes", kind="windowed")
    axes[2].plot(
        lengths, [x / scale for x in extra], color="#d62728", marker="s", label="windowed attention"
    )
    finish(axes[0], "forward", "ms")
    finish(axes[1], "forward + backward", "ms")
    finish(axes[2], "memory on top of the inputs, forward + backward", "MiB")
    figure.suptitle(
        f"512 routes of 4 bits beside 16 heads of 128, window 2048, bfloat16: {report['hardware']}",
        fontsize=10,
    )
    for suffix in (".png", ".svg"):
        figure.savefig(source.with_suffix(suffix), dpi=130)


if __name__ == "__main__":
    main()
