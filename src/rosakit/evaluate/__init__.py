"""Evaluation: perplexity by position and distance, recall tasks, cost, as typed results."""

from rosakit.evaluate.distance import perplexity_by_distance
from rosakit.evaluate.efficiency import efficiency
from rosakit.evaluate.environment import Environment, describe_environment
from rosakit.evaluate.grids import GridCell, GridResult
from rosakit.evaluate.harness import harness
from rosakit.evaluate.inspection import Inspection, Trace, inspect_text
from rosakit.evaluate.needles import Needle, make_needles
from rosakit.evaluate.niah import niah
from rosakit.evaluate.perplexity import perplexity, position_edges
from rosakit.evaluate.recall import copying, mqar
from rosakit.evaluate.results import (
    DistanceResult,
    Efficiency,
    EvaluationResult,
    NiahCell,
    NiahResult,
    PerplexityResult,
    PositionBucket,
    VariantResult,
)

__all__ = [
    "DistanceResult",
    "Efficiency",
    "Environment",
    "EvaluationResult",
    "GridCell",
    "GridResult",
    "Inspection",
    "Needle",
    "NiahCell",
    "NiahResult",
    "PerplexityResult",
    "PositionBucket",
    "Trace",
    "VariantResult",
    "copying",
    "describe_environment",
    "efficiency",
    "harness",
    "inspect_text",
    "make_needles",
    "mqar",
    "niah",
    "perplexity",
    "perplexity_by_distance",
    "position_edges",
]
