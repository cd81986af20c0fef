"""Launching retrieval and the counterfactual backward pass.

The plain torch forms that these kernels are tested against are `rosakit.ops.retrieve` and
`rosakit.ops.estimators.counterfactual.credit_naive`.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from rosakit.cuda import compile
from rosakit.errors import InvalidInputError, InvalidTypeError

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNMATCHED = {"zero": 0, "self": 1, "null": 2}
_TILE_BYTES = 32 * 33 * 4
_ACCUMULATOR_BYTES = 32 << 20  # of one chunk of routes: it should stay in the L2 cache
_SLICE = 32  # positions a thread block of `credit` covers: many blocks fill the GPU
_KERNELS = ("retrieve", "credit", "finish", "pack")


def supports(x: Tensor, e0: Tensor, bits: int) -> bool:
    """Whether the kernels take tensors like these: floating point up to 32 bits, M in 1..8."""
    return x.is_cuda and x.dtype in _FORMATS and e0.dtype in _FORMATS and 1 <= bits <= 8


def pack(x: Tensor, bits: int) -> Tensor:
    """Channels ``[B, T, C]`` to symbols ``[B, R, T]``, uint8: bit ``m`` is ``x[r * M + m] > 0``."""
    batch, length, channels = x.shape
    _check_formats(x, x, bits)
    routes = channels // bits
    symbols = torch.empty((batch, routes, length), dtype=torch.uint8, device=x.device)
    if symbols.numel():
        with torch.cuda.device(x.device):
            kernel = _kernels(x, x, bits, fixed=False)["pack"]
            arguments = [compile.pointer(_aligned(x)), compile.pointer(symbols)]
            arguments += [compile.unsigned(length), compile.unsigned(routes)]
            grid = (_ceil(length, 32), _ceil(routes, 32), batch)
            kernel.launch(grid, 256, 32 * 36, arguments)
    return symbols


def retrieve_forward(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    unmatched: str,
) -> Tensor:
    """Values at matched positions, ``[B, T, C]`` in the dtype of `v` (semantics section 2).

    Args:
        v: ``[B, T, C]``.
        position: int32 ``[B, R, T]``.
        e0, e1: ``[C]``; e_null: ``[C]`` for ``unmatched="null"``.
    """
    batch, length, channels = v.shape
    _check_formats(v, e0, bits)
    routes = channels // bits
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    if y.numel():
        with torch.cuda.device(v.device):
            kernel = _kernels(v, e0, bits, fixed=False)["retrieve"]
            null = None if e_null is None else _aligned(e_null.to(e0.dtype))
            kept = [_aligned(v), position.contiguous(), _aligned(e0), _aligned(e1.to(e0.dtype))]
            arguments = [compile.pointer(tensor) for tensor in (*kept, null, y)]
            arguments += [compile.unsigned(n) for n in (length, routes, UNMATCHED[unmatched])]
            grid = (_ceil(length, 32), _ceil(routes, 32), batch)
            kernel.launch(grid, 256, _TILE_BYTES, arguments)
    return y


def counterfactual_backward(
    grad: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    position: Tensor,
    cf_position: Tensor | None,
    *,
    bits: int,
    unmatched: str = "zero",
    key_credit: str = "matched",
    credit_from: Tensor | None = None,
    soft_values: bool = True,
    temperature: float = 1.0,
    deterministic: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Every gradient of counterfactual retrieval (semantics 3.1).

    Args:
        grad: ``[B, T, C]``, the loss's slope.
        q, k, v: ``[B, T, C]``; q and k None for retrieval alone.
        position: int32 ``[B, R, T]``.
        cf_position: int32 ``[B, R, T, M]``, or None for retrieval alone.
        key_credit: "matched" or "successor".
        credit_from: int32 ``[B, R, T]``, for run granularity with ``key_credit="matched"``: the
            successor position whose credit each key position takes, -1 for none.
        deterministic: sums whose result does not depend on their order (64-bit fixed point, a
            little slower); None follows ``torch.use_deterministic_algorithms``.

    Returns:
        ``dq, dk`` (None without `cf_position`), ``dv``, ``de0``, ``de1`` and, in float32,
        ``de_null``.
    """
    batch, length, channels = v.shape
    _check_formats(v, e0, bits)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    credit = cf_position is not None and cf_position.shape[-1] > 0
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    dq = torch.empty_like(dv) if credit else None
    dk = torch.empty_like(dv) if credit else None
    slices = _ceil(length, _SLICE)
    partials = torch.zeros((batch * slices, 3, channels), dtype=torch.float32, device=v.device)
    if dv.numel():
        with torch.cuda.device(v.device):
            _credit_in_chunks(
                _aligned(grad.to(v.dtype)),
                None if q is None else _aligned(q.to(v.dtype)),
                None if k is None else _aligned(k.to(v.dtype)),
                _aligned(v),
                _aligned(e0),
                _aligned(e1.to(e0.dtype)),
                position.contiguous(),
                cf_position.contiguous() if credit and cf_position is not None else None,
                credit_from,
                (dq, dk, dv, partials),
                bits,
                (UNMATCHED[unmatched], int(soft_values), key_credit, temperature, deterministic),
            )
    # Clones: an operator's outputs must not share memory (torch raises an error otherwise).
    de0, de1, de_null = (total.clone() for total in partials.sum(0))
    return dq, dk, dv, de0.to(e0.dtype), de1.to(e1.dtype), de_null


def _credit_in_chunks(
    grad: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    position: Tensor,
    cf_position: Tensor | None,
    credit_from: Tensor | None,
    out: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    bits: int,
    options: tuple[int, int, str, float, bool],
) -> None:
    dq, dk, dv, partials = out
    unmatched, soft, key_credit, temperature, deterministic = options
    batch, length, channels = v.shape
    routes = channels // bits
    slices = _ceil(length, _SLICE)
    kernels = _kernels(v, e0, bits, fixed=deterministic)
    cell = 8 if deterministic else 4
    route_bytes = batch * length * 2 * bits * cell
    chunk = max(1, min(routes, _ACCUMULATOR_BYTES // route_bytes))
    if chunk >= 32:
        chunk = chunk // 32 * 32  # whole warps
    chunk = _ceil(routes, _ceil(routes, chunk))
    shape = (batch * length * chunk * 2 * bits,)
    sums = torch.empty(
        shape, dtype=torch.int64 if deterministic else torch.float32, device=v.device
    )
    scale = fixed_point_scale(grad, e0, e1, bits) if deterministic else None
    inputs = (grad, q, v, e0, e1)
    key_from = 2 if credit_from is not None else 1 if key_credit == "successor" else 0
    for first in range(0, routes, chunk):
        here = min(chunk, routes - first)
        sums.zero_()
        arguments: list[compile.Argument] = [
            compile.pointer(tensor)
            for tensor in (*inputs, position, cf_position, dq, sums, partials, scale)
        ]
        numbers = (length, routes, first, here, _SLICE, unmatched, soft)
        arguments += [compile.unsigned(n) for n in numbers]
        arguments += [(temperature, ctypes.c_float)]
        grid = (slices, _ceil(here, 32), batch)
        kernels["credit"].launch(grid, 256, (1 + bits) * _TILE_BYTES, arguments)
        arguments = [compile.pointer(tensor) for tensor in (sums, k, v, credit_from, dk, dv, scale)]
        arguments += [compile.unsigned(n) for n in (length, routes, first, here, key_from)]
        arguments += [(temperature, ctypes.c_float)]
        kernels["finish"].launch((_ceil(length, 8), _ceil(here, 32), batch), 256, 0, arguments)


def fixed_point_scale(grad: Tensor, e0: Tensor, e1: Tensor, bits: int) -> Tensor:
    """A power of two that no sum overflows 63 bits with; on the device, without a sync."""
    length = grad.shape[1]
    largest = (grad.abs().amax((0, 1)).float() * (e1.float() - e0.float()).abs()).amax()
    terms = 2 * length * bits * (bits + 1)  # a bound on the terms of one sum, each below `largest`
    _, exponent = torch.frexp(largest.clamp(min=1e-18))
    return torch.ldexp(
        torch.ones((), device=grad.device), 61 - exponent - math.ceil(math.log2(terms))
    ).reshape(1)


def _kernels(x: Tensor, e0: Tensor, bits: int, *, fixed: bool) -> dict[str, compile.Kernel]:
    macros = {
        "M": bits,
        "SCALAR": _FORMATS[x.dtype],
        "E_SCALAR": _FORMATS[e0.dtype],
        "FIXED": int(fixed),
    }
    return compile.load(("format.cuh", "credit.cu"), _KERNELS, macros, x.device)


def _check_formats(x: Tensor, e0: Tensor, bits: int) -> None:
    if not supports(x, e0, bits):
        raise InvalidTypeError(
            "the GPU kernels take float32, bfloat16 or float16 CUDA tensors and 1..8 bits a route; "
            f"got {x.dtype} on {x.device}, {e0.dtype}, {bits} bits"
        )
    if x.shape[-1] % bits:
        raise InvalidInputError(f"{x.shape[-1]} channels do not divide into routes of {bits} bits")


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, as vector loads need; a copy where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
