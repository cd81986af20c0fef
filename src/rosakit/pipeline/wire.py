"""Symbols as they travel between devices: two of up to four bits a byte, wider ones as they are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A byte of two symbols as two bytes, the earlier symbol first in memory.
_PAIRS = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)
_PAIRS = _PAIRS.reshape(-1).view(np.uint16)


def travels_packed(symbols: Tensor, bits: int) -> bool:
    """Whether these symbols are packed two a byte."""
    return symbols.dtype == torch.uint8 and bits <= 4


def pack(symbols: Tensor, bits: int) -> Tensor:
    """Streams ``[S, T]`` in the form that is copied: ``[S, ceil(T / 2)]`` bytes up to four bits.

    Symbol ``2 i`` is the low half of byte ``i``, symbol ``2 i + 1`` the high half.
    """
    if not travels_packed(symbols, bits):
        return symbols.contiguous()
    packed = symbols[:, 0::2].clone()
    high = symbols[:, 1::2]
    packed[:, : high.shape[1]] |= high << 4
    return packed


def unpack(packed: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """The inverse of `pack` for bytes of two symbols: ``[S, length]`` (numpy, releases the GIL)."""
    pairs = np.take(_PAIRS, packed)
    return np.ascontiguousarray(pairs.view(np.uint8)[:, :length])
