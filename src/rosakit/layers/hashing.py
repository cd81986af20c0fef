"""Hash codes of token contexts: addresses that are good before anything has trained.

Every route looks at a context of its own: the current token, the last two, the last three, …
(semantics section 4). Its symbol is a hash of that context, so equal contexts have equal symbols
and others share one by chance only, once in ``2**bits``. Codes depend on token ids alone, so all
layers share them, and the exact match of a forward pass is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rosakit import symbols

_MULTIPLIER = 0x5851F42D4C957F2D  # odd, of Knuth's MMIX generator; products wrap around at 2**64
_FINISH = 0x2545F4914F6CDD1D  # odd, of Vigna's xorshift64*
_OFFSET = 0x1E3779B97F4A7C15  # of the golden ratio
_LOW = (1 << 63) - 1


def token_windows(input_ids: Tensor, reach: int, segment_starts: Tensor | None = None) -> Tensor:
    """Each position's last `reach` tokens within its segment.

    Args:
        input_ids: integer ``[B, T]``.
        reach: number of tokens, the current one included.
        segment_starts: int32 ``[B, T]`` or None (see `rosakit.ops.segments`).

    Returns:
        int64 ``[reach, B, T]``: token id + 1, or 0 where the segment does not reach that far back.
    """
    batch, length = input_ids.shape
    own = torch.arange(length, device=input_ids.device)
    if segment_starts is None:
        rank = own.expand(batch, length)
    else:
        starts = segment_starts.to(own.device, torch.int64)
        rank = torch.where(starts >= 0, own - starts, -1)
    ids = input_ids.to(torch.int64) + 1
    back = (own - torch.arange(reach, device=own.device)[:, None]).clamp(min=0)  # [reach, T]
    windows = ids[:, back].transpose(0, 1)
    there = rank >= torch.arange(reach, device=own.device)[:, None, None]
    return torch.where(there, windows, 0)


def context_codes(
    windows: Tensor, orders: Sequence[int], *, routes: int, bits: int, seed: int = 0
) -> Tensor:
    """One symbol for each route and position.

    Args:
        windows: int64 ``[reach, B, T]`` from `token_windows`, ``reach >= max(orders)``.
        orders: tokens a context; route ``r`` has ``orders[r % len(orders)]``.
        routes: R.
        bits: bits a symbol, 1..16.
        seed: another seed gives other codes; so does every route.

    Returns:
        ``[B, R, T]``, uint8 up to 8 bits and uint16 above.
    """
    contexts = []
    running = torch.zeros_like(windows[0])
    for order in range(1, max(orders) + 1):
        # Each step mixes before the next token enters, so that the order of tokens counts.
        running = _mix((running + windows[order - 1]) * _MULTIPLIER)
        if order in orders:
            contexts.append(running)
    place = sorted(set(orders))
    of_route = torch.tensor(
        [place.index(orders[r % len(orders)]) for r in range(routes)], device=windows.device
    )
    # Other constants than the contexts', so that no route's key is the hash of some token.
    number = torch.arange(1, routes + 1, device=windows.device) + 1_000_003 * seed
    keys = _mix(number * _FINISH + _OFFSET)
    hashed = torch.stack(contexts)[of_route] ^ keys[:, None, None]  # [R, B, T]
    code = _mix(hashed * _FINISH) >> (63 - bits)
    work = torch.uint8 if bits <= 8 else torch.int32
    return code.to(work).transpose(0, 1).contiguous().to(symbols.symbol_dtype(bits))


def code_channels(codes: Tensor, bits: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Symbols ``[B, R, T]`` as channels of ``scale`` (bit 1) and ``-scale`` (bit 0), ``[B, T, C]``.

    The real-valued form that a learned refinement is added to; packing gives the symbols back.
    """
    channels = symbols.unpack(codes, bits, dtype)
    return (2 * channels - 1) * scale


def _mix(x: Tensor) -> Tensor:
    """Fold the high bits of a product, where all bits of its factors meet, onto the low ones."""
    x = x & _LOW  # nonnegative: shifts of negative numbers would keep their sign
    x = (x ^ (x >> 32)) * _MULTIPLIER & _LOW
    return x ^ (x >> 29)
