"""Typed results of evaluations, and their JSON form."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.evaluate.environment import Environment
from rosakit.evaluate.grids import GridResult
from rosakit.files import atomic_write

__all__ = [
    "DistanceResult",
    "Efficiency",
    "EvaluationResult",
    "NiahCell",
    "NiahResult",
    "PerplexityResult",
    "PositionBucket",
    "VariantResult",
    "niah_from",
    "perplexity_from",
    "write_json",
]

FORMAT = 1
"""Version of the JSON layout; a reader refuses a newer one."""


@dataclass(frozen=True)
class PositionBucket:
    """Predicted tokens whose number of preceding tokens is in ``start <= p < stop``.

    Attributes:
        start, stop: in tokens.
        tokens: how many were predicted.
        nll: sum of their negative log likelihoods, nats.
    """

    start: int
    stop: int
    tokens: int
    nll: float

    @property
    def label(self) -> str:
        """Such as ``256-512``."""
        return f"{self.start}-{self.stop}"

    @property
    def ppl(self) -> float:
        """Perplexity of this bucket; nan if it is empty."""
        return _perplexity(self.nll, self.tokens)


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of documents, overall and by position. Every predicted token weighs the same.

    Attributes:
        buckets: in order of position; together they hold every predicted token.
        documents: number of documents, each scored alone from its first token.
    """

    buckets: tuple[PositionBucket, ...]
    documents: int

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(bucket.tokens for bucket in self.buckets)

    @property
    def ppl(self) -> float:
        """Perplexity over all predicted tokens."""
        return self.beyond(0)

    @property
    def ppl_by_position(self) -> dict[str, float]:
        """Perplexity of each bucket that holds tokens."""
        return {bucket.label: bucket.ppl for bucket in self.buckets if bucket.tokens}

    def beyond(self, position: int) -> float:
        """Perplexity over the buckets that start at `position` or later; nan if there are none."""
        late = [bucket for bucket in self.buckets if bucket.start >= position]
        return _perplexity(sum(b.nll for b in late), sum(b.tokens for b in late))


def _perplexity(nll: float, tokens: int) -> float:
    if tokens == 0:
        return math.nan
    mean = nll / tokens
    # exp overflows past 709 nats; a model that bad has an infinite perplexity for all purposes.
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class DistanceResult:
    """Losses of predicted tokens by how far back their context occurred before.

    Attributes:
        buckets: by distance in tokens, ascending.
        new: tokens whose context has not occurred before (start and stop are 0).
        min_length: shorter repetitions of the context do not count, tokens.
    """

    buckets: tuple[PositionBucket, ...]
    new: PositionBucket
    min_length: int

    def beyond(self, distance: int) -> float:
        """Perplexity over the buckets that start at `distance` or later; nan if empty."""
        far = [b for b in self.buckets if b.start >= distance]
        return _perplexity(sum(b.nll for b in far), sum(b.tokens for b in far))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistanceResult:
        """The inverse of `dataclasses.asdict`."""
        buckets = tuple(PositionBucket(**bucket) for bucket in values["buckets"])
        return cls(buckets, PositionBucket(**values["new"]), values["min_length"])


@dataclass(frozen=True)
class Efficiency:
    """Cost of one context length.

    Attributes:
        length: tokens of the context.
        prefill_seconds: of reading it, median.
        decode_ms: of one more token after it, median.
        cache_bytes: keys, values and streaming states held after it.
        peak_bytes: most memory of the GPU during prefill and decode; None on a CPU.
    """

    length: int
    prefill_seconds: float
    decode_ms: float
    cache_bytes: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class NiahCell:
    """One cell of the needle-in-a-haystack grid.

    Attributes:
        length: tokens of the whole prompt and answer.
        depth: where the needle stands, 0 (start of the haystack) to 1 (its end).
        samples, correct: needles asked for, and answers reproduced exactly.
        beyond, beyond_correct: those whose needle neither question nor answer see through the
            window and its sinks.
    """

    length: int
    depth: float
    samples: int
    correct: int
    beyond: int
    beyond_correct: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0..1."""
        return self.correct / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class NiahResult:
    """A needle-in-a-haystack grid.

    Attributes:
        cells: one for each length and depth.
        window: the window, in tokens, that decides what lies beyond it.
        question: "repeat" (the question ends in the needle's own words) or "paraphrase".
        seed: of keys, values and places.
        sink_tokens: first tokens that stay visible beside the window.
    """

    cells: tuple[NiahCell, ...]
    window: int
    question: str
    seed: int
    sink_tokens: int = 0

    @property
    def samples(self) -> int:
        """All needles."""
        return sum(cell.samples for cell in self.cells)

    @property
    def accuracy(self) -> float:
        """Share of correct answers over all cells, 0..1."""
        return sum(c.correct for c in self.cells) / self.samples if self.samples else math.nan

    @property
    def beyond(self) -> int:
        """Needles beyond the window."""
        return sum(cell.beyond for cell in self.cells)

    @property
    def accuracy_beyond(self) -> float:
        """Share of correct answers among needles beyond the window, 0..1; nan if there are none."""
        return sum(c.beyond_correct for c in self.cells) / self.beyond if self.beyond else math.nan


@dataclass(frozen=True)
class VariantResult:
    """What was measured of one variant.

    Attributes:
        perplexity: on held-out documents.
        niah: None if it was not measured.
        trained_parameters: numbers that training changed.
        description: what the variant is, in words.
        other: perplexities on other kinds of held-out text, by kind.
        grids: other recall tasks by name ("niah_multi", "mqar", "copying", …).
        distance: perplexity by the distance to repeated content, by kind of text.
        scores: tasks of the evaluation harness, accuracy or what the task calls its score.
        efficiency: time and memory, one entry a length.
    """

    perplexity: PerplexityResult
    niah: NiahResult | None = None
    trained_parameters: int = 0
    description: str = ""
    other: dict[str, PerplexityResult] = field(default_factory=dict)
    grids: dict[str, GridResult] = field(default_factory=dict)
    distance: dict[str, DistanceResult] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    efficiency: tuple[Efficiency, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the numbers a reader wants first, then what they were made of."""
        return {
            **_summary(self.perplexity),
            "niah": None if self.niah is None else _number(self.niah.accuracy_beyond),
            "trained_parameters": self.trained_parameters,
            "description": self.description,
            "perplexity_detail": asdict(self.perplexity),
            "niah_detail": None if self.niah is None else asdict(self.niah),
            "other": {
                kind: {**_summary(result), "perplexity_detail": asdict(result)}
                for kind, result in self.other.items()
            },
            "grids": {name: asdict(grid) for name, grid in self.grids.items()},
            "distance": {kind: asdict(result) for kind, result in self.distance.items()},
            "scores": self.scores,
            "efficiency": [asdict(entry) for entry in self.efficiency],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VariantResult:
        """The inverse of `to_dict`."""
        grid = values["niah_detail"]
        return cls(
            perplexity_from(values["perplexity_detail"]),
            None if grid is None else niah_from(grid),
            values["trained_parameters"],
            values["description"],
            {k: perplexity_from(v["perplexity_detail"]) for k, v in values["other"].items()},
            # Results written before these suites existed lack them.
            {k: GridResult.from_dict(v) for k, v in values.get("grids", {}).items()},
            {k: DistanceResult.from_dict(v) for k, v in values.get("distance", {}).items()},
            dict(values.get("scores", {})),
            tuple(Efficiency(**entry) for entry in values.get("efficiency", ())),
        )


def _summary(result: PerplexityResult) -> dict[str, Any]:
    return {
        "ppl": _number(result.ppl),
        "ppl_by_position": {k: _number(v) for k, v in result.ppl_by_position.items()},
    }


def niah_from(detail: Mapping[str, Any]) -> NiahResult:
    """The inverse of `dataclasses.asdict` of a needle grid."""
    return NiahResult(**{**detail, "cells": tuple(NiahCell(**cell) for cell in detail["cells"])})


def perplexity_from(detail: Mapping[str, Any]) -> PerplexityResult:
    """The inverse of `dataclasses.asdict` of a perplexity."""
    buckets = tuple(PositionBucket(**bucket) for bucket in detail["buckets"])
    return PerplexityResult(buckets, detail["documents"])


@dataclass(frozen=True)
class EvaluationResult:
    """Variants of one model, measured on the same data.

    Attributes:
        variants: by name, in the order of the table.
        environment: hardware, versions, date, commit.
        seed: of everything random.
        seconds: of the whole run.
        settings: what was run: model, data, window, recipe.
    """

    variants: dict[str, VariantResult]
    environment: Environment
    seed: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def gap_closed(
        self, variant: str, *, floor: str, ceiling: str, beyond: int = 0
    ) -> float | None:
        """Share of the gap in nats between two variants that a third one closes.

        Args:
            variant: name of the variant that is judged.
            floor: name of the variant at share 0.
            ceiling: name of the variant at share 1.
            beyond: count tokens with at least this many before them only.

        Returns:
            None if a variant is missing or there is no gap.
        """
        if not {variant, floor, ceiling} <= self.variants.keys():
            return None
        high, mid, low = (
            math.log(self.variants[name].perplexity.beyond(beyond))
            for name in (floor, variant, ceiling)
        )
        return (high - mid) / (high - low) if high > low else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format": FORMAT,
            "hardware": self.environment.hardware,
            "versions": self.environment.versions,
            "date": self.environment.date,
            "commit": self.environment.commit,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "settings": self.settings,
            "variants": {name: variant.to_dict() for name, variant in self.variants.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationResult:
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a newer format, or something else altogether.
        """
        try:
            if values["format"] > FORMAT:
                raise CheckpointError(
                    f"these results have format {values['format']}, this rosakit reads up to "
                    f"{FORMAT}; use a newer rosakit"
                )
            return cls(
                {k: VariantResult.from_dict(v) for k, v in values["variants"].items()},
                Environment(
                    values["hardware"], values["versions"], values["date"], values["commit"]
                ),
                values["seed"],
                values["seconds"],
                values["settings"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not an evaluation result: {error!r} is missing") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON form; the file appears complete or not at all."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no such file, or no evaluation result.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}; `rosakit eval RUN` writes evaluation.json"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is no JSON: {error}") from error
        return cls.from_dict(values)


def _number(value: float) -> float | None:
    """JSON knows neither nan nor infinity."""
    return value if math.isfinite(value) else None


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write JSON; the file appears complete or not at all.

    Raises:
        InvalidInputError: the file cannot be written (the message names the reason).
    """
    target = Path(path)
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, text)
    except OSError as error:
        raise InvalidInputError(
            f"cannot write {target}: {error.strerror or error}; free some space or name another "
            "folder"
        ) from error
    return target
