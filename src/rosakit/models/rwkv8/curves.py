"""Training curves of runs side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosakit.errors import DataError, RosakitError


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``result.json`` of a finished run, or a run's folder.

    Raises:
        DataError: it is missing or no result.
    """
    source = Path(path)
    if source.is_dir():
        source = source / "result.json"
    try:
        result: dict[str, Any] = json.loads(source.read_text())
        result["losses"], result["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is no result of a training run ({error}); a finished run writes result.json"
        ) from None
    return result


def label_of(result: dict[str, Any]) -> str:
    """What distinguishes a run in a legend."""
    config = result["config"]
    layers = config["layers"]
    if config["task"] == "count" and layers == 0:
        return "token memory alone"
    if not config.get("rosa", True):
        return "without ROSA"
    shown = "" if layers is None else f", {layers} layers"
    stride = config.get("estimator_options", {}).get("stride", 1)
    sampled = f" of 2 in {stride}" if stride > 1 else ""
    bits = f"{config['bits']} bit{'s' if config['bits'] > 1 else ''}"
    return f"{bits}{shown}, {config['estimator']}{sampled}"


def smooth(values: Sequence[float], span: int = 25) -> list[float]:
    """Mean of the last `span` values at every place."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - span] if i >= span else 0.0)
        out.append(total / min(i + 1, span))
    return out


def plot(results: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the loss (mean of 25 steps) of every run over its steps.

    Raises:
        RosakitError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise RosakitError("plots need matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = [label_of(result) for result in results]
    for result, label in zip(results, labels, strict=True):
        losses = smooth(result["losses"])
        seed = f", seed {result['config']['seed']}" if labels.count(label) > 1 else ""
        name = f"{label}{seed} (held out {result['validation_loss']:.3f})"
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a counted token (mean of 25 steps)")
    axes.set_title(" and ".join(dict.fromkeys(r["config"]["task"] for r in results)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
