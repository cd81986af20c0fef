"""The summary of the evidence as Markdown tables, for the documentation.

python -m benchmarks.evidence.tables docs/results/evidence/summary.json
python -m benchmarks.evidence.tables --sweeps docs/results/evidence/sweep/summary.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.sweeps import GROUPS

__all__ = ["markdown", "sweeps"]

TASKS = ("niah", "niah_paraphrase", "niah_multi", "niah_confusable", "mqar_lines", "mqar",
         "copying_code")  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """Tables of perplexity, share of the gap, and recall, a window each."""
    parts = []
    for window, found in summary["windows"].items():
        arms = found["arms"]
        for kind in next(iter(arms.values()))["perplexity"]:
            parts += [f"**{kind}, window {window}**", "", *_perplexity(arms, kind), ""]
        parts += [f"**recall beyond the window of {window}**", "", *_recall(arms), ""]
        if any(arm.get("short") for arm in arms.values()):
            parts += [f"**short contexts, window {window}**", "", *_short(arms), ""]
    return "\n".join(parts)


def sweeps(summary: Mapping[str, Any]) -> str:
    """One table of the sweeps, a row an arm, question by question."""
    keys = {(str(r["window"]), r["arm"]): r["extra_keys"] for r in summary["runs"]}
    head = ["question", "arm", "trained, M", "more keys a query", "gap closed, late: code",
            "books", "needle", "confusable", "MQAR, lines", "seeds"]  # fmt: skip
    rows = []
    for group in GROUPS:
        for index, (name, arm) in enumerate(group.finished(summary).items()):
            extra = keys.get((str(group.window), name))
            recall = arm["recall_beyond_window"]
            rows.append(
                [
                    group.title if index == 0 else "",
                    f"`{name}`",
                    f"{arm['trained_parameters'] / 1e6:.1f}",
                    "" if extra is None else f"{extra:.0f}",
                    *(_shown(arm["gap_closed"].get(k), 0, 100, "%") for k in ("code", "books")),
                    *(
                        _shown(recall.get(task), 0, 100, "%")
                        for task in ("niah", "niah_confusable", "mqar_lines")
                    ),
                    _seeds(arm),
                ]
            )
    return "\n".join(_table(head, rows))


def _perplexity(arms: Mapping[str, Any], kind: str) -> list[str]:
    labels = list(dict.fromkeys(k for arm in arms.values() for k in arm["perplexity"][kind]))
    head = ["arm", *(label.replace("-", "–") for label in labels), "gap closed, late", "seeds"]
    rows = []
    for name, arm in arms.items():
        cells = [_shown(arm["perplexity"][kind].get(label), 2) for label in labels]
        share = arm["gap_closed"].get(kind)
        rows.append([name, *cells, _shown(share, 0, 100, "%"), _seeds(arm)])
    return _table(head, rows)


def _recall(arms: Mapping[str, Any]) -> list[str]:
    tasks = [t for t in TASKS if any(t in arm["recall_beyond_window"] for arm in arms.values())]
    rows = [
        [name, *(_shown(arm["recall_beyond_window"].get(t), 0, 100, "%") for t in tasks)]
        for name, arm in arms.items()
    ]
    return _table(["arm", *(t.replace("_", ", ") for t in tasks)], rows)


def _short(arms: Mapping[str, Any]) -> list[str]:
    tasks = list(dict.fromkeys(t for arm in arms.values() for t in arm.get("short", {})))
    rows = [
        [name, *(_shown(arm["short"].get(t), 1, 100, "%") for t in tasks), _mean(arm["short"])]
        for name, arm in arms.items()
        if arm.get("short")
    ]
    return _table(["arm", *(t.replace("_", " ") for t in tasks), "mean"], rows)


def _mean(tasks: Mapping[str, Any]) -> str:
    return f"{100 * sum(t['mean'] for t in tasks.values()) / len(tasks):.1f}%"


def _seeds(arm: Mapping[str, Any]) -> str:
    return str(len(arm["seeds"])) if arm["seeds"] else "untrained"


def _shown(value: Mapping[str, Any] | None, digits: int, scale: float = 1, unit: str = "") -> str:
    """Mean and sample standard deviation."""
    if value is None:
        return ""
    text = f"{scale * value['mean']:.{digits}f}{unit}"
    if value["sd"] is not None and scale * value["sd"] >= 0.5 * 10**-digits:
        text += f" ± {scale * value['sd']:.{digits}f}"
    return text


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


if __name__ == "__main__":
    shown = sweeps if sys.argv[1] == "--sweeps" else markdown
    sys.stdout.write(shown(json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8"))) + "\n")
