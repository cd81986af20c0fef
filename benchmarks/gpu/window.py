"""The block mask of a causal window, written down: T x T booleans would not fit at 131072."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


def windowed(window: int):  # type: ignore[no-untyped-def]
    """Who sees whom: the `window` newest positions, the own one included."""

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    return sees


def block_mask(length: int, window: int, device: str) -> BlockMask:
    """For multiples of 128: block ``b`` sees blocks ``b - window / 128`` to ``b``, the two outer
    ones in part."""
    blocks, reach = length // BLOCK, window // BLOCK
    own = torch.arange(blocks, device=device, dtype=torch.int32)
    oldest = own - reach
    partial = torch.where(oldest >= 0, 2, 1).to(torch.int32)
    indices = torch.zeros((blocks, blocks), device=device, dtype=torch.int32)
    indices[:, 0] = torch.where(oldest >= 0, oldest, own)
    if blocks > 1:
        indices[:, 1] = torch.where(oldest >= 0, own, 0)
    first = (oldest + 1).clamp(min=0)
    whole = own - first
    full = (first[:, None] + own[None]).clamp(max=blocks - 1).to(torch.int32)
    return BlockMask.from_kv_blocks(
        *(x[None, None] for x in (partial, indices, whole, full)),
        BLOCK_SIZE=BLOCK,
        mask_mod=windowed(window),
    )
