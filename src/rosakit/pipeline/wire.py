"""Symbols as they travel between devices: two of up to four bits a byte, wider ones as they are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    # Sixteen bits a byte, its halves in the low half of each: whole-array steps on few bytes.
    pairs = packed.astype("<u2")
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return np.ascontiguousarray(pairs.view(np.uint8)[:, :length])
