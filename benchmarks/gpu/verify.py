"""A second method for sizes at which the oracle is too slow: one row of the table at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def match_by_rows(q: Tensor, k: Tensor, flips: int) -> tuple[Tensor, Tensor, Tensor]:
    """Longest earlier match, latest on ties, of ``[routes, T]`` symbols: T steps of O(T).

    Returns:
        Position and length ``[routes, T]`` and flipped positions ``[routes, T, flips]``, int32.
    """
    routes, length = q.shape
    position = torch.full((routes, length), -1, dtype=torch.int32, device=q.device)
    size = torch.zeros_like(position)
    flipped = torch.full((routes, length, flips), -1, dtype=torch.int32, device=q.device)
    common = torch.zeros((routes, length + 1), dtype=torch.int64, device=q.device)
    order = torch.arange(length, device=q.device)
    masks = torch.tensor([0, *(1 << m for m in range(flips))], dtype=torch.uint8, device=q.device)
    for i in range(length):
        wanted = q[:, i, None] ^ masks  # [routes, 1 + flips]
        rows = (k[:, None, :] == wanted[..., None]) * (common[:, None, :-1] + 1)
        if i:
            best, at = (rows[..., :i] * length + order[:i]).max(-1)
            found = best >= length
            where = torch.where(found, at + 1, -1).int()
            position[:, i] = where[:, 0]
            size[:, i] = torch.where(found[:, 0], best[:, 0] // length, 0).int()
            flipped[:, i] = where[:, 1:]
        common[:, 1:] = rows[:, 0]
    return position, size, flipped
