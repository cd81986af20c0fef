"""Which query positions are credited when only a sample of them is.

Stratified: of every ``stride`` neighbouring positions one, at a pseudo-random place. So each
position is drawn with probability ``1 / stride``, at the end of a sequence too, and counting what
is drawn ``stride`` times gives the full sum on average.

The draw is a pure function of the query's bits and a seed. A layer that is recomputed under
gradient checkpointing, a resumed run and a match begun ahead draw alike without any state of a
generator, and as the bits change from step to step and from text to text, so does the draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError

_PRIME = 2_147_483_647  # products of two numbers below it stay inside int64
_FIRST, _SECOND = 1_103_515_245, 48_271


def check_stride(stride: int) -> None:
    """Refuse a stride that samples nothing.

    Raises:
        InvalidInputError: below 1.
    """
    if stride < 1:
        raise InvalidInputError(
            f"stride must be at least 1 (every position), got {stride}; stride=4 credits a quarter"
        )


@torch.no_grad()
def sample_positions(q: Tensor, stride: int, seed: int) -> Tensor:
    """The positions to credit: int64 ``[B, ceil(T / stride)]``, ascending.

    Args:
        q: ``[B, T, C]``; only its bits matter.

    Entry ``j`` lies in ``j * stride .. j * stride + stride - 1``; one that is ``T`` or more stands
    for no position.
    """
    length = q.shape[1]
    ones = (q > 0).sum(-1)  # [B, T]
    places = torch.arange(1, length + 1, device=q.device, dtype=torch.int64)
    # A checksum of the row: it says nothing about any one position, and seldom stays the same.
    row = (ones * _mix(places + seed % _PRIME)).remainder(_PRIME).sum(-1).remainder(_PRIME)
    blocks = torch.arange(-(-length // stride), device=q.device, dtype=torch.int64)
    drawn = _mix(row[:, None] + _mix(blocks + 1 + seed % _PRIME))
    # The high part: the low bits of a multiplicative generator are the poor ones.
    return blocks * stride + drawn * stride // _PRIME


def sampled_mask(sampled: Tensor, length: int) -> Tensor:
    """Bool ``[B, T]``, true at the sampled positions."""
    mask = torch.zeros(sampled.shape[0], length + 1, dtype=torch.bool, device=sampled.device)
    return mask.scatter(1, sampled.clamp(max=length), True)[:, :length].contiguous()


def _mix(x: Tensor) -> Tensor:
    """Pseudo-random numbers in ``0 .. _PRIME - 1``."""
    x = (x.remainder(_PRIME) * _FIRST).remainder(_PRIME)
    x = (x ^ (x >> 15)).remainder(_PRIME)
    x = (x * _SECOND).remainder(_PRIME)
    x = (x ^ (x >> 13)).remainder(_PRIME)
    return (x * _FIRST).remainder(_PRIME)
