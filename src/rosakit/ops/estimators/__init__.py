"""Gradient estimators: one file each, registered by name.

An estimator decides how gradients reach the bits of q, k and v; the hard ones share the exact
forward of semantics section 2.
"""

from rosakit.ops.estimators import bitflip, counterfactual, soft_dp, soft_scan, suffix_attention
from rosakit.ops.estimators.registry import Estimator, MatchOptions, get, names, register

__all__ = [
    "Estimator",
    "MatchOptions",
    "bitflip",
    "counterfactual",
    "get",
    "names",
    "register",
    "soft_dp",
    "soft_scan",
    "suffix_attention",
]
