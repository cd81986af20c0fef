"""What is measured of every arm: perplexity by position and distance, needles, keys, copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.evidence.train import Learner
from rosakit.evaluate import VariantResult, make_needles
from rosakit.evaluate.distance import measure_distance
from rosakit.evaluate.grids import GridResult
from rosakit.evaluate.needles import Question
from rosakit.evaluate.niah import measure_niah, niah_grid
from rosakit.evaluate.perplexity import measure_perplexity, position_edges
from rosakit.evaluate.recall import copy_prompts, measure_prompts, mqar_prompts
from rosakit.evaluate.scores import Scorer
from rosakit.evaluate.short import make_short, measure_short

__all__ = ["Tasks", "measure"]


@dataclass(frozen=True)
class Tasks:
    """Sizes of the measurements.

    Attributes:
        window, sinks: what they hide counts as beyond, for all arms alike.
        lengths: tokens of the prompts.
        depths: of needles.
        samples: prompts a cell; single needles get twice as many.
        pairs: of MQAR.
        documents: held-out texts a kind.
        short: short-context items a task and kind; 0 for none.
        seed: of the prompts.
    """

    window: int
    sinks: int
    lengths: tuple[int, ...] = (4096, 8192)
    depths: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.9)
    samples: int = 4
    pairs: tuple[int, ...] = (8, 32)
    documents: int = 32
    short: int = 300
    seed: int = 1


_NEEDLES: tuple[tuple[str, Question, int, bool, int], ...] = (
    ("niah", "repeat", 0, False, 2),
    ("niah_multi", "repeat", 4, False, 1),
    ("niah_confusable", "repeat", 4, True, 1),
    ("niah_paraphrase", "paraphrase", 0, False, 1),
)
"""Name, question, other needles, whether they share a word with the one asked for, and how many
times the samples."""


def _remembering(scorer: Scorer) -> Scorer:
    """Whole texts are scored once, however many measurements read them."""
    known: dict[bytes, Any] = {}

    def score(input_ids: Any, mask: Any = None, keep: int | None = None) -> Any:
        if keep is not None or mask is not None:
            return scorer(input_ids, mask, keep)
        name = input_ids.cpu().numpy().tobytes()
        if name not in known:
            known[name] = scorer(input_ids)
        return known[name]

    return score


def measure(
    learner: Learner, tokenizer: Any, heldout: dict[str, np.ndarray], tasks: Tasks
) -> VariantResult:
    """All measurements of one arm."""
    scorer, device = _remembering(learner.scorer()), learner.device
    common: dict[str, Any] = {"window": tasks.window, "sink_tokens": tasks.sinks,
                              "device": device, "seed": tasks.seed}  # fmt: skip
    texts = {kind: rows[: tasks.documents].tolist() for kind, rows in heldout.items()}
    length = max(len(row) for rows in texts.values() for row in rows)
    edges = position_edges(length, tasks.window)
    scored = {
        kind: measure_perplexity(scorer, rows, device=device, edges=edges)["model"]
        for kind, rows in texts.items()
    }
    steps = [tasks.window * 2**n for n in range(-2, 6) if tasks.window * 2**n < length]
    far = {
        kind: measure_distance(scorer, rows, [max(1, int(s)) for s in steps], device=device)[
            "model"
        ]
        for kind, rows in texts.items()
    }
    grids: dict[str, GridResult] = {}
    single = None
    if tasks.lengths:
        for name, question, distractors, confusable, times in _NEEDLES:
            needles = make_needles(
                tokenizer, tasks.lengths, tasks.depths, samples=times * tasks.samples,
                question=question, distractors=distractors, confusable=confusable, seed=tasks.seed,
            )  # fmt: skip
            found = measure_niah(scorer, needles, question=question, **common)["model"]
            if name == "niah":
                single = found
            else:
                grids[name] = niah_grid(found)
        forms: tuple[tuple[str, Literal["tokens", "lines"]], ...] = (
            ("mqar", "tokens"), ("mqar_lines", "lines"),
        )  # fmt: skip
        for name, form in forms:
            prompts = mqar_prompts(
                tokenizer, tasks.lengths, tasks.pairs, samples=tasks.samples, form=form,
                seed=tasks.seed,
            )  # fmt: skip
            axes = ("length", "pairs")
            grids[name] = measure_prompts(scorer, prompts, axes, **common)["model"]
        for kind, rows in texts.items():
            gaps = [n - 64 for n in tasks.lengths if n >= 128 and 2 * n <= sum(map(len, rows))]
            if gaps:
                copies = copy_prompts(rows, gaps, [64], samples=2 * tasks.samples, seed=tasks.seed)
                axes = ("distance", "passage")
                grids[f"copying_{kind}"] = measure_prompts(scorer, copies, axes, **common)["model"]
    scores: dict[str, float] = {}
    if tasks.short:
        items = make_short(tokenizer, texts, count=tasks.short, seed=tasks.seed)
        scores = measure_short(learner.scorer(), items, device=device)["model"]
    kinds = list(scored)
    return VariantResult(
        scored[kinds[0]], single, learner.parameters, learner.arm.what,
        {kind: scored[kind] for kind in kinds[1:]}, grids, far, scores,
    )  # fmt: skip
