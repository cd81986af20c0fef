"""Bits and symbols: how real-valued channels become the letters that are matched.

Channel ``r * M + m`` is bit ``m`` of route ``r``; bit ``m`` carries weight ``2**m``; a channel is
1 where it is strictly positive, so zero (of either sign) and NaN are bit 0. Source: semantics
section 1, after ROSA-Tuning and RWKV-8's QKV layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError, InvalidTypeError

MAX_BITS = 16


def symbol_dtype(bits: int) -> torch.dtype:
    """The smallest dtype that holds symbols of `bits` bits: uint8 up to 8, uint16 up to 16.

    Raises:
        InvalidInputError: `bits` is not in 1..16.
    """
    if not 1 <= bits <= MAX_BITS:
        raise InvalidInputError(f"bits must be in 1..{MAX_BITS}, got {bits}")
    return torch.uint8 if bits <= 8 else torch.uint16


def routes_of(channels: int, bits: int) -> int:
    """Number of routes that `channels` channels make at `bits` bits each.

    Raises:
        InvalidInputError: the channels do not divide into routes.
    """
    symbol_dtype(bits)
    if channels < 1 or channels % bits:
        raise InvalidInputError(
            f"{channels} channels do not divide into routes of {bits} bits; "
            f"choose bits that divide {channels}, or another number of channels"
        )
    return channels // bits


def binarize(x: Tensor) -> Tensor:
    """``x > 0`` as bool, same shape."""
    return x > 0


def pack(x: Tensor, bits: int) -> Tensor:
    """Real-valued channels to symbols.

    Args:
        x: ``[B, T, C]`` of any floating dtype (or bool), ``C = R * bits``.
        bits: bits per route, 1..16.

    Returns:
        Symbols ``[B, R, T]``, uint8 for ``bits <= 8`` and uint16 above, contiguous.

    Raises:
        InvalidInputError: `x` is not 3-dimensional or its channels do not divide by `bits`.
        InvalidTypeError: `x` is neither floating point nor bool.
    """
    if x.dim() != 3:
        raise InvalidInputError(f"expected x of shape [B, T, C], got {list(x.shape)}")
    if not (x.is_floating_point() or x.dtype == torch.bool):
        raise InvalidTypeError(f"expected floating point or bool channels, got {x.dtype}")
    routes = routes_of(x.shape[-1], bits)
    set_bits = (x > 0).view(*x.shape[:-1], routes, bits)
    # One pass a bit: the intermediate is a symbol tensor, never an int64 tensor of all channels.
    work = torch.uint8 if bits <= 8 else torch.int32
    symbols = set_bits[..., 0].to(work)
    for bit in range(1, bits):
        symbols = symbols | (set_bits[..., bit].to(work) << bit)
    return symbols.to(symbol_dtype(bits)).transpose(1, 2).contiguous()


def unpack(symbols: Tensor, bits: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Symbols to channels of 0 and 1: the inverse of `pack`.

    Args:
        symbols: ``[B, R, T]`` of an integer dtype.
        bits: bits per route, 1..16.
        dtype: dtype of the result.

    Returns:
        ``[B, T, R * bits]`` of `dtype`.
    """
    if symbols.dim() != 3:
        raise InvalidInputError(f"expected symbols of shape [B, R, T], got {list(symbols.shape)}")
    symbol_dtype(bits)
    work = symbols.transpose(1, 2)
    if work.dtype == torch.uint16:  # uint16 lacks shifts on some torch builds
        work = work.to(torch.int32)
    shifts = torch.arange(bits, device=symbols.device, dtype=work.dtype)
    channels = (work.unsqueeze(-1) >> shifts) & 1
    return channels.flatten(-2).to(dtype)
