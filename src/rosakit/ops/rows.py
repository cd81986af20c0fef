"""The layout that retrieval and its gradients compute in.

Channels are ``[B, T, C]`` with ``C = R * M``; matches are ``[B, R, T]``. Inside, a route's ``M``
channels travel as one *row* of a ``[B * R * T, M]`` table, so that one index a route and position
serves all of them: no ``[B, T, C]`` index and no ``[..., M, M]`` gather ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_rows(x: Tensor, bits: int) -> Tensor:
    """``[B, T, C]`` to ``[B * R * T, M]``."""
    b, t, c = x.shape
    return x.view(b, t, c // bits, bits).transpose(1, 2).reshape(-1, bits)


def from_rows(rows: Tensor, batch: int, length: int) -> Tensor:
    """``[B * R * T, M]`` to ``[B, T, C]``: the inverse of `to_rows`."""
    bits = rows.shape[1]
    return rows.view(batch, -1, length, bits).transpose(1, 2).reshape(batch, length, -1)


def row_index(position: Tensor) -> Tensor:
    """Row number of each match ``[B * R * T]``; a null points one past the last row."""
    b, r, t = position.shape
    base = torch.arange(b * r, device=position.device, dtype=torch.int64).view(b, r, 1) * t
    return torch.where(position >= 0, base + position, b * r * t).flatten()


def add_null_row(rows: Tensor) -> Tensor:
    """Append the row of zeros that a null reads."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def scatter_rows(rows: Tensor, index: Tensor, count: int | None = None) -> Tensor:
    """Sum `rows` into the rows named by `index`; what lands on the null row is dropped.

    Args:
        count: rows of the result; None for as many as come in.
    """
    count = rows.shape[0] if count is None else count
    return rows.new_zeros(count + 1, *rows.shape[1:]).index_add_(0, index, rows)[:-1]


def effective_position(position: Tensor, unmatched: str) -> Tensor:
    """The position that is read: with ``unmatched="self"`` a null reads its own position."""
    if unmatched != "self":
        return position
    own = torch.arange(position.shape[-1], device=position.device, dtype=position.dtype)
    return torch.where(position >= 0, position, own)


def channel_mask(position: Tensor, bits: int) -> Tensor:
    """Matched channels: bool ``[B, T, C]`` from ``[B, R, T]``."""
    return (position >= 0).repeat_interleave(bits, dim=1).transpose(1, 2)
