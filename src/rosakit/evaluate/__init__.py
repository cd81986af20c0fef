"""Evaluation: perplexity by position and needles in haystacks, as typed results."""

from rosakit.evaluate.environment import Environment, describe_environment
from rosakit.evaluate.needles import Needle, make_needles
from rosakit.evaluate.niah import niah
from rosakit.evaluate.perplexity import perplexity, position_edges
from rosakit.evaluate.results import (
    EvaluationResult,
    NiahCell,
    NiahResult,
    PerplexityResult,
    PositionBucket,
    VariantResult,
)

__all__ = [
    "Environment",
    "EvaluationResult",
    "Needle",
    "NiahCell",
    "NiahResult",
    "PerplexityResult",
    "PositionBucket",
    "VariantResult",
    "describe_environment",
    "make_needles",
    "niah",
    "perplexity",
    "position_edges",
]
