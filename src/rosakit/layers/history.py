"""A growing table of integers, the plain half of every streaming state."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[Any]


class History:
    """A growing ``[B, W, length]`` table of integers, each row with its own length.

    Args:
        batch: B.
        width: W, entries a position.
        dtype: integer dtype.
    """

    def __init__(self, batch: int, width: int, dtype: npt.DTypeLike) -> None:
        self.table: Array = np.zeros((batch, width, 0), dtype)
        self.lengths: Array = np.zeros(batch, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return int(self.table.nbytes)

    def append(self, chunk: Array, mask: Array | None) -> Array:
        """Add ``chunk [B, W, n]`` where ``mask [B, n]``; returns the row positions ``[B, n]``.

        A masked position gets the position that the next real one will have.
        """
        batch, _, n = chunk.shape
        if mask is None:
            steps, added = np.arange(n)[None], np.full(batch, n)
        else:
            steps, added = np.cumsum(mask, 1) - mask, mask.sum(1)
        after = self.lengths + added
        # One more than there is: a masked position at the end points past it.
        self._reserve(int(after.max(initial=0)) + 1)
        for row in range(batch):
            real = chunk[row] if mask is None else chunk[row][:, mask[row]]
            self.table[row, :, self.lengths[row] : after[row]] = real
        position: Array = self.lengths[:, None] + steps
        self.lengths = after
        return position

    def _reserve(self, length: int) -> None:
        capacity = self.table.shape[2]
        if length > capacity:
            # Half as much again: a table of a long context is large.
            grown = max(length, capacity + capacity // 2, 64)
            table = np.zeros((*self.table.shape[:2], grown), self.table.dtype)
            table[:, :, :capacity] = self.table
            self.table = table

    def read(self, position: Array) -> Array:
        """Entries at ``position [B, W, n]`` (nonnegative)."""
        batch, width, capacity = self.table.shape
        base = np.arange(batch * width).reshape(batch, width, 1) * capacity
        found: Array = self.table.reshape(-1)[base + position]
        return found

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order (beam search)."""
        order = rows.cpu().numpy()
        self.table, self.lengths = self.table[order], self.lengths[order]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths ``[B]``."""
        self.lengths = np.minimum(self.lengths, lengths.cpu().numpy())
