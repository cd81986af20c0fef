"""Our part of the model card that `save_pretrained` leaves: how to load it, what it is, results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["write_card"]

_BEGIN, _END = "<!-- rosakit: begin -->", "<!-- rosakit: end -->"
_TEMPLATE = "# Model Card for Model ID"
"""How peft's card begins as long as nobody has written one."""


def write_card(folder: Path, config: Any, *, base: str | None) -> None:
    """Write or renew our part of ``README.md``; what others wrote around it stays.

    Args:
        folder: where the adapter is saved.
        config: its `RosaPeftConfig`.
        base: name or path of the base model.
    """
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else _new_card(base)
    part = f"{_BEGIN}\n{_body(config, base)}\n{_END}"
    text = card.text
    if _BEGIN in text and _END in text:
        head, _, rest = text.partition(_BEGIN)
        card.text = head + part + rest.partition(_END)[2]
    elif _TEMPLATE in text:
        # Nothing but empty headings; the versions at its end are worth keeping.
        _, mark, versions = text.partition("### Framework versions")
        card.text = f"\n{part}\n\n{mark}{versions}"
    else:
        card.text = f"\n{part}\n\n{text.lstrip()}"
    card.save(path)


def _new_card(base: str | None) -> ModelCard:
    data = ModelCardData(library_name="peft", base_model=base, pipeline_tag="text-generation")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n")


def _body(config: Any, base: str | None) -> str:
    name = base or "BASE_MODEL"
    window = "full attention" if config.window is None else f"{config.window} tokens"
    layers = "all" if config.layers is None else ", ".join(map(str, config.layers))
    adapters = (
        f"layers: {layers}; {config.bits} bits a route; projections of rank "
        f"{config.projection_rank or 'full'}; {config.address} addresses; {config.estimator}"
        if config.adapters
        else "none"
    )
    lines = [
        f"# Long-range memory for {name}",
        "",
        "Added with [rosakit](https://pypi.org/project/rosakit); the base model's weights are "
        "unchanged. Attention sees a window, retrieval by exact suffix matching sees the rest.",
        "",
        "```python",
        "import rosakit.tuning.peft  # makes the method known to peft",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{name}")',
        'model = PeftModel.from_pretrained(base, "this/adapter")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| attention window | {window} |",
        f"| sink tokens | {'–' if config.window is None else config.sink_tokens} |",
        f"| adapters | {adapters} |",
        f"| token route | {_count(config.token_candidates) if config.token_route else 'none'} |",
        f"| LoRA rank | {config.lora_rank or 'none'} |",
    ]
    if not config.retrieve:
        lines += ["", "**This is a control**: trained alike, but nothing is retrieved."]
    if config.evaluation:
        lines += ["", "## Evaluation", "", *_table(config.evaluation)]
    return "\n".join(lines)


def _count(candidates: int) -> str:
    return f"{candidates} candidate{'s' if candidates > 1 else ''}"


def _table(results: Mapping[str, Any]) -> list[str]:
    """Rows of name and number, or of name and one number a column."""
    columns = list(
        dict.fromkeys(c for row in results.values() if isinstance(row, Mapping) for c in row)
    )
    if not columns:
        head = ["| | |", "|---|---|"]
        return [*head, *(f"| {name} | {_cell(value)} |" for name, value in results.items())]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in results.items():
        values = row if isinstance(row, Mapping) else {columns[0]: row}
        lines.append(f"| {name} | {' | '.join(_cell(values.get(c)) for c in columns)} |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
