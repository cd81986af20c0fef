"""The model card of a result: how to load it, what it was trained on, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosakit.files import atomic_write
from rosakit.tuning.settings import TuneConfig

__all__ = ["write_card"]


def write_card(folder: Path, config: TuneConfig, metrics: Mapping[str, Any]) -> Path:
    """Write ``README.md`` into the result's folder and return its path.

    Args:
        folder: the result.
        config: the run.
        metrics: what `metrics.json` holds.
    """
    path = folder / "README.md"
    atomic_write(path, _card(folder, config, metrics))
    return path


def _card(folder: Path, config: TuneConfig, metrics: Mapping[str, Any]) -> str:
    base = config.model
    hub = [f"base_model: {base}"] if base and not Path(base).exists() else []
    rosa = config.attached()
    lines = [
        "---",
        "library_name: rosakit",
        *hub,
        "tags: [rosa, long-context, adapter]",
        "---",
        "",
        f"# {folder.name}",
        "",
        f"Long-range memory for `{base or 'a local model'}`, trained with "
        "[rosakit](https://pypi.org/project/rosakit) "
        f"{metrics['versions']['rosakit']}. Only the added parameters are stored here; the base "
        "model is unchanged.",
        "",
        "```python",
        "from rosakit.tuning import load_result",
        f'model, tokenizer, config = load_result("{folder.name}")',
        "```",
        "",
        f"On the command line: `rosakit generate {folder.name} --prompt 'Once upon a time'`.",
        "",
    ]
    if config.control:
        lines += [
            "**This is a control**: trained alike, but nothing is retrieved. It measures what "
            "training alone does.",
            "",
        ]
    if metrics["steps"] < metrics["steps_planned"]:
        lines += [
            f"**Unfinished**: stopped at step {metrics['steps']} of {metrics['steps_planned']}.",
            "",
        ]
    lines += ["## What was added", "", "| | |", "|---|---|"]
    if rosa is not None:
        window = "full attention" if rosa.window is None else f"{rosa.window} tokens"
        lines += [
            f"| attention window | {window} |",
            f"| sink tokens | {rosa.sink_tokens if rosa.window is not None else '–'} |",
            f"| adapters | {_adapters(rosa)} |",
            f"| token route | {_route(rosa)} |",
        ]
    lines += [
        f"| LoRA rank | {config.lora_rank or '–'} |",
        f"| trained parameters | {metrics['parameters_trained']:,} of {metrics['parameters']:,} |",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| sources | {', '.join(config.data.sources) or 'given in memory'} |",
        f"| documents | {metrics['documents']['train']} for training, "
        f"{metrics['documents']['heldout']} held out |",
        f"| steps x tokens | {metrics['steps']} x {config.batch_size * config.accumulate} x "
        f"{config.length} = {metrics['tokens']:,} tokens |",
        f"| seed | {config.seed} |",
        f"| time | {metrics['seconds']:.0f} s on {metrics['device']} |",
        "",
        "## Metrics",
        "",
        "| | |",
        "|---|---|",
        f"| training loss, last tenth of steps (nats/token) | {_number(metrics['train_loss'])} |",
        f"| held-out loss (nats/token) | {_number(metrics['heldout_loss'])} |",
    ]
    lines += [f"| {name} | {value:.4f} |" for name, value in metrics["health"].items()]
    lines += [
        "",
        "Losses alone do not show that retrieval helps: compare with a run that differs in "
        "`control: true` only, and with full attention (`rosakit eval`).",
        "",
    ]
    return "\n".join(lines)


def _adapters(rosa: Any) -> str:
    if not rosa.adapters:
        return "–"
    layers = "all layers" if rosa.layers is None else f"layers {', '.join(map(str, rosa.layers))}"
    return f"{layers}, {rosa.bits} bits a route, {rosa.address} addresses, {rosa.estimator}"


def _route(rosa: Any) -> str:
    return f"{rosa.token_candidates} candidates" if rosa.token_route else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
