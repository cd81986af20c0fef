"""Attention under any mask, block by block: on a GPU what no query of a block sees costs nothing.

FlexAttention's kernel, compiled once for each shape. Evaluations ask for many lengths, so sequences
are padded to a few of them. `view.py` has the same attention in plain products.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["attend", "blocks_of", "padded"]

SIZE = 128
"""Queries and keys of a block."""
SHORT, STEP = 512, 4096
"""Short sequences are padded to the one, others to a multiple of the other."""


def padded(length: int) -> int:
    """The length that a sequence of this length is computed at."""
    return SHORT if length <= SHORT else -(-length // STEP) * STEP


def blocks_of(mask: Tensor) -> BlockMask:
    """Which blocks of a bool mask ``[B, T, T]`` hold anything, and which everything.

    Args:
        mask: one row for all sequences, or one each; T a multiple of the block's size.
    """
    rows, length, _ = mask.shape

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b if rows > 1 else b * 0, i, j]

    return create_block_mask(seen, rows, None, length, length, device=mask.device, BLOCK_SIZE=SIZE)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, scale: float | None) -> Tensor:
    """``[B, H, T, D]`` from queries ``[B, H, T, D]``, keys and values ``[B, G, T, D]``.

    Args:
        q, k, v: T at most that of the mask.
        blocks: who sees whom.
        scale: of the products; None for ``1 / sqrt(D)``.
    """
    length = q.shape[2]
    spare = blocks.seq_lengths[0] - length
    q, k, v = (F.pad(x, (0, 0, 0, spare)) if spare else x for x in (q, k, v))
    attention = _compiled() if q.is_cuda else flex_attention
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped)
    return out[:, :, :length]


@cache
def _compiled() -> Any:
    # One entry for each length, with and without gradients, with one mask for all rows or one each.
    # Beyond the limit a whole graph fails, where a partial one would go on without the kernel.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
