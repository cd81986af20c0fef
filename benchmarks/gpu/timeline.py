"""A picture of one pipeline call: copies, kernels and threads on one axis of time.

python benchmarks/gpu/timeline.py docs/results/pipeline_trace.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "attention and MLP": "#7f7f7f",
    "symbols to the host": "#1f77b4",
    "unpack": "#9467bd",
    "match (C++ threads)": "#2ca02c",
    "positions to the GPU": "#ff7f0e",
    "submit": "#000000",
    "join: the caller sleeps": "#d62728",
}


def lane_of(event: dict[str, Any]) -> str | None:
    """The row of the picture that an event belongs to."""
    name = event["name"]
    if name.startswith("rosakit::"):
        return {
            "submit": "submit",
            "unpack": "unpack",
            "match": "match (C++ threads)",
            "join": "join: the caller sleeps",
        }.get(name.removeprefix("rosakit::"))
    if event["kind"] == "gpu_memcpy":
        if "DtoH" in name:
            return "symbols to the host"
        return "positions to the GPU" if "HtoD" in name else None
    return "attention and MLP" if event["kind"] == "kernel" else None


def main() -> None:
    source = Path(sys.argv[1])
    events = json.loads(source.read_text())
    kinds = sorted({event["flips"] for event in events})
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(11, 2.7 * len(kinds)), layout="constrained", squeeze=False
    )
    for axis, flips in zip(axes[:, 0], kinds, strict=True):
        mine = [e for e in events if e["flips"] == flips]
        first = min(e["us"] for e in mine)
        for row, lane in enumerate(COLOURS):
            bars = [
                ((e["us"] - first) / 1000, max(e["duration_us"] / 1000, 0.004))
                for e in mine
                if lane_of(e) == lane
            ]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=COLOURS[lane], linewidth=0)
        axis.set_yticks(range(len(COLOURS)), list(COLOURS))
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        what = f"with {flips} flipped bits" if flips else "forward"
        axis.set_title(f"one submission of 512 routes, {what}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    for suffix in (".png", ".svg"):
        figure.savefig(source.with_suffix(suffix), dpi=130)


if __name__ == "__main__":
    main()
