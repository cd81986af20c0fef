"""Pure functions on tensors: matching, retrieval and the estimators behind `rosa`."""

from rosakit.ops.match import suffix_match
from rosakit.ops.retrieve import retrieve
from rosakit.ops.rosa import rosa
from rosakit.types import Match

__all__ = ["Match", "retrieve", "rosa", "suffix_match"]
