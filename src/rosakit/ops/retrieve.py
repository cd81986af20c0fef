"""Reading value bits at matched positions, with its gradient.

`retrieve_forward` and `retrieve_backward` are the plain torch forms; the estimators share them.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rosakit import cuda, symbols
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops import rows
from rosakit.types import Unmatched


def retrieve(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    unmatched: Unmatched = "zero",
    e_null: Tensor | None = None,
) -> Tensor:
    """Values at matched positions: ``y = e0 + (e1 - e0) * (v[position] > 0)`` (semantics 2).

    The gradient of `v` is the counterfactual one (semantics 3.1): the slope of
    ``e0 + (e1 - e0) * sigmoid(v)`` summed over the positions that read it.

    Args:
        v: ``[B, T, C]`` floating point, ``C = R * bits``.
        position: int32 ``[B, R, T]``, -1 where nothing matched.
        e0: ``[C]``, the value of a 0 bit.
        e1: ``[C]``, the value of a 1 bit.
        bits: bits per route.
        unmatched: "zero" (exact zeros), "self" (the position's own value) or "null" (`e_null`).
        e_null: ``[C]``, needed by ``unmatched="null"``.

    Returns:
        ``[B, T, C]`` in the dtype of `v`.

    Raises:
        InvalidInputError: shapes that do not fit, or `e_null` missing.
        InvalidTypeError: `v` is not floating point or `position` not int32.
    """
    check_values(v, e0, e1, bits, unmatched, e_null)
    if position.dtype != torch.int32:
        raise InvalidTypeError(f"position must be int32, got {position.dtype}")
    expected = [v.shape[0], v.shape[2] // bits, v.shape[1]]
    if list(position.shape) != expected:
        raise InvalidInputError(f"position must have shape {expected}, got {list(position.shape)}")
    y: Tensor = torch.ops.rosakit.retrieve(v, position, e0, e1, e_null, bits, unmatched)
    return y


def check_values(
    v: Tensor, e0: Tensor, e1: Tensor, bits: int, unmatched: str, e_null: Tensor | None
) -> None:
    """Refuse value tensors that do not fit together."""
    if v.dim() != 3:
        raise InvalidInputError(f"v must have shape [B, T, C], got {list(v.shape)}")
    if not v.is_floating_point():
        raise InvalidTypeError(f"v must be floating point, got {v.dtype}")
    symbols.routes_of(v.shape[2], bits)
    if unmatched not in ("zero", "self", "null"):
        raise InvalidInputError(f"unmatched must be 'zero', 'self' or 'null', got {unmatched!r}")
    if (unmatched == "null") != (e_null is not None):
        raise InvalidInputError("e_null belongs to unmatched='null': give both or neither")
    for name, e in (("e0", e0), ("e1", e1), ("e_null", e_null)):
        if e is not None and list(e.shape) != [v.shape[2]]:
            raise InvalidInputError(
                f"{name} must have shape [C] = [{v.shape[2]}], got {list(e.shape)}"
            )


def gpu_kernels(v: Tensor, e0: Tensor, bits: int) -> ModuleType | None:
    """The fused CUDA kernels (`rosakit.cuda.credit`) where they take such tensors."""
    if not v.is_cuda or not cuda.available():
        return None
    from rosakit.cuda import credit

    return credit if credit.supports(v, e0, bits) else None


def read_bits(v: Tensor, position: Tensor, bits: int) -> Tensor:
    """Value bits at `position` as bool ``[B, T, C]``; False where the position is null."""
    packed = symbols.pack(v, bits)
    if packed.dtype == torch.uint16:
        packed = packed.to(torch.int32)
    read = packed.gather(2, position.clamp(min=0).to(torch.int64))
    return symbols.unpack(torch.where(position >= 0, read, 0), bits)


def retrieve_forward(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    unmatched: str,
) -> Tensor:
    """The forward of `retrieve` in plain torch."""
    position = rows.effective_position(position, unmatched)
    value = read_bits(v, position, bits)
    y = values_of_bits(value, rows.channel_mask(position, bits), e0, e1, e_null, v.dtype)
    return y.contiguous()  # what the fake kernel promises, and what the next product wants


def values_of_bits(
    value: Tensor,
    matched: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``y = e0 + (e1 - e0) * value`` where matched, else `e_null` or zero (semantics 2).

    Args:
        value: bool ``[B, T, C]``, the bits read.
        matched: bool ``[B, T, C]``; all true where a null reads its own value.
        e0: ``[C]``.
        e1: ``[C]``.
        e_null: ``[C]`` or None.
        dtype: of the result ``[B, T, C]``.
    """
    y = torch.where(value, e1.to(dtype), e0.to(dtype))
    fill = y.new_zeros(()) if e_null is None else e_null.to(dtype)
    return torch.where(matched, y, fill)


def retrieve_backward(
    grad: Tensor,
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    bits: int,
    unmatched: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `retrieve_forward`: ``dv [B, T, C]``, ``de0``, ``de1``, ``de_null [C]``.

    ``dv[tau, c] = p (1 - p) * sum of theta[t, c] over t with position(t) == tau`` with
    ``p = sigmoid(v)`` and ``theta = grad * (e1 - e0)`` (semantics 3.1).
    """
    position = rows.effective_position(position, unmatched)
    work = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(work)
    matched = rows.channel_mask(position, bits)
    value = read_bits(v, position, bits)
    de1 = torch.where(value & matched, g, 0).sum((0, 1))
    de_matched = torch.where(matched, g, 0).sum((0, 1))
    de_null = g.sum((0, 1)) - de_matched
    theta = g * (e1.to(work) - e0.to(work))
    summed = rows.scatter_rows(rows.to_rows(theta, bits), rows.row_index(position))
    p = v.to(work).sigmoid()
    dv = p * (1 - p) * rows.from_rows(summed, v.shape[0], v.shape[1])
    dv = dv.to(v.dtype).contiguous()
    return dv, (de_matched - de1).to(e0.dtype), de1.to(e1.dtype), de_null


def read(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    unmatched: str,
) -> Tensor:
    """`retrieve_forward`, fused on a GPU."""
    kernels = gpu_kernels(v, e0, bits)
    if kernels is None:
        return retrieve_forward(v, position, e0, e1, e_null, bits, unmatched)
    y: Tensor = kernels.retrieve_forward(v, position, e0, e1, e_null, bits, unmatched)
    return y


# --- the operator ------------------------------------------------------------------------------


@torch.library.custom_op("rosakit::retrieve", mutates_args=())
def _retrieve_op(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    unmatched: str,
) -> Tensor:
    return read(v, position, e0, e1, e_null, bits, unmatched)


@_retrieve_op.register_fake
def _(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
    unmatched: str,
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("rosakit::retrieve_backward", mutates_args=())
def _retrieve_backward_op(
    grad: Tensor,
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    bits: int,
    unmatched: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = gpu_kernels(v, e0, bits)
    if kernels is None:
        return retrieve_backward(grad, v, position, e0, e1, bits, unmatched)
    _, _, dv, de0, de1, de_null = kernels.counterfactual_backward(
        grad, None, None, v, e0, e1, position, None, bits=bits, unmatched=unmatched
    )
    return dv, de0, de1, de_null


@_retrieve_backward_op.register_fake
def _(
    grad: Tensor,
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    bits: int,
    unmatched: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = torch.promote_types(grad.dtype, torch.float32)
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(e0),
        torch.empty_like(e1),
        e0.new_empty(e0.shape, dtype=work),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    v, position, e0, e1, e_null, bits, unmatched = inputs
    ctx.save_for_backward(v, position, e0, e1)
    ctx.null_dtype = None if e_null is None else e_null.dtype
    ctx.bits, ctx.unmatched = bits, unmatched


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    v, position, e0, e1 = ctx.saved_tensors
    dv, de0, de1, de_null = torch.ops.rosakit.retrieve_backward(
        grad, v, position, e0, e1, ctx.bits, ctx.unmatched
    )
    de_null = None if ctx.null_dtype is None else de_null.to(ctx.null_dtype)
    return dv, None, de0, de1, de_null, None, None


_retrieve_op.register_autograd(_backward, setup_context=_setup_context)
