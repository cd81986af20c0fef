"""A rule for lengths written by hand: what learned lengths could have been told from the start."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rosakit.layers import RosaAdapter
from rosakit.layers.learned_length import LengthSelection

__all__ = ["Rule", "write_rule"]


class Rule(NamedTuple):
    """Octaves that are added to the length of a match.

    Attributes:
        near: fewer than 256 tokens back.
        far: 256 to 2047 tokens back.
        single: of one token.
        long: of six tokens or more.
    """

    near: float = 0.0
    far: float = 0.0
    single: float = 0.0
    long: float = 0.0


@torch.no_grad()
def write_rule(adapter: RosaAdapter, rule: Rule) -> None:
    """Give an adapter's untrained lengths a rule; tables are octaves of distance, halves of length.

    Raises:
        TypeError: the adapter has no learned lengths.
    """
    lengths = adapter.selection
    if not isinstance(lengths, LengthSelection):
        raise TypeError(f"a rule needs an adapter with learned lengths, not {lengths!r}")
    lengths.distance_score[:8] = rule.near / lengths.pace
    lengths.distance_score[8:11] = rule.far / lengths.pace
    lengths.length_score[0] = rule.single / lengths.pace
    lengths.length_score[5:] = rule.long / lengths.pace
