"""Padding, packing and documents, all reduced to one tensor: `segment_starts`.

``segment_starts`` is int32 ``[B, T]``: for each position the index, within its row, of the first
position of the segment (document, or unpadded sequence) that it belongs to, and -1 at padding. A
query at ``i`` sees keys ``j >= segment_starts[i]`` only, so nothing matches across a boundary or
into padding (semantics 2.2). One tensor of fixed shape keeps the operator compilable and needs no
host synchronisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError


def from_attention_mask(mask: Tensor) -> Tensor:
    """`segment_starts` of a left- or right-padded batch.

    Args:
        mask: ``[B, T]`` bool or integer; nonzero marks real positions. The real positions of a
            row have to be contiguous.

    Returns:
        int32 ``[B, T]``.

    Raises:
        InvalidInputError: wrong shape, or a row whose real positions have a hole.
    """
    if mask.dim() != 2:
        raise InvalidInputError(
            f"attention_mask must have shape [B, T], got {list(mask.shape)}; "
            "pass the 2-D padding mask, not the 4-D attention bias"
        )
    real = mask != 0
    rising = real[:, 1:] & ~real[:, :-1]
    first = real[:, :1]
    if not torch.compiler.is_compiling() and bool(((rising.sum(1) + first.sum(1)) > 1).any()):
        raise InvalidInputError(
            "attention_mask has a hole: the real positions of a row must be contiguous "
            "(left or right padding); use document_ids for several documents in a row"
        )
    start = real.to(torch.int32).argmax(dim=1, keepdim=True).to(torch.int32)
    return torch.where(real, start, torch.full_like(start, -1))


def from_lengths(lengths: Tensor | Sequence[int], batch: int, length: int) -> Tensor:
    """`segment_starts` of right-padded rows given their lengths.

    Args:
        lengths: ``[B]``, each in ``0..length``.

    Raises:
        InvalidInputError: wrong number of lengths or one out of range.
    """
    values = torch.as_tensor(lengths)
    if values.dim() != 1 or values.numel() != batch:
        raise InvalidInputError(
            f"lengths must have one entry a row ({batch}), got shape {list(values.shape)}"
        )
    if bool(((values < 0) | (values > length)).any()):
        raise InvalidInputError(f"every length must be in 0..{length}, got {values.tolist()}")
    inside = torch.arange(length, device=values.device)[None] < values[:, None]
    return torch.where(inside, 0, -1).to(torch.int32)


def from_cu_seqlens(cu_seqlens: Tensor | Sequence[int], length: int) -> Tensor:
    """`segment_starts` of one packed row, ``[1, T]``, from cumulative sequence lengths.

    Args:
        cu_seqlens: ``[N + 1]``, rising from 0 to the number of packed positions, as
            flash-attention's variable-length kernels take it. Positions past the last are padding.

    Raises:
        InvalidInputError: not rising from 0, or reaching past `length`.
    """
    bounds = torch.as_tensor(cu_seqlens).to(torch.int64)
    if bounds.dim() != 1 or bounds.numel() < 1:
        raise InvalidInputError(f"cu_seqlens must have shape [N + 1], got {list(bounds.shape)}")
    values = bounds.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(values))
    if values[0] != 0 or not rising or values[-1] > length:
        raise InvalidInputError(
            f"cu_seqlens must rise from 0 to at most the packed length {length}, got {values}"
        )
    starts = torch.full((1, length), -1, dtype=torch.int32, device=bounds.device)
    for begin, end in itertools.pairwise(values):
        starts[0, begin:end] = begin
    return starts


def from_document_ids(ids: Tensor) -> Tensor:
    """`segment_starts` of rows whose documents are numbered.

    Args:
        ids: integer ``[B, T]``; equal neighbours belong to one document, a change starts a new
            one, negative marks padding.

    Returns:
        int32 ``[B, T]``.
    """
    if ids.dim() != 2:
        raise InvalidInputError(f"document_ids must have shape [B, T], got {list(ids.shape)}")
    positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    change = torch.ones_like(ids, dtype=torch.bool)
    change[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = torch.where(change, positions, 0).cummax(dim=1).values
    return torch.where(ids >= 0, starts, -1).to(torch.int32)


def from_position_ids(position_ids: Tensor) -> Tensor:
    """`segment_starts` of packed rows whose position ids restart at 0 with every document.

    Args:
        position_ids: integer ``[B, T]``.
    """
    if position_ids.dim() != 2:
        raise InvalidInputError(
            f"position_ids must have shape [B, T], got {list(position_ids.shape)}"
        )
    positions = torch.arange(position_ids.shape[1], device=position_ids.device)
    change = torch.ones_like(position_ids, dtype=torch.bool)
    change[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.where(change, positions, 0).cummax(dim=1).values.to(torch.int32)


def _check_starts(starts: Tensor) -> None:
    """Refuse starts that name no segments, on which backends would differ without a word.

    Not while compiling and not on a GPU, where looking at values would stop the stream.
    """
    if torch.compiler.is_compiling() or starts.device.type != "cpu" or starts.dim() != 2:
        return
    own = torch.arange(starts.shape[1], dtype=torch.int32)
    before = torch.cat([torch.full_like(starts[:, :1], -1), starts[:, :-1]], dim=1)
    wrong = (starts != -1) & (starts != own) & (starts != before)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise InvalidInputError(
            f"segment_starts[{row}, {column}] = {int(starts[row, column])} neither starts a "
            f"segment there ({column}), nor continues the one before "
            f"({int(before[row, column])}), nor marks padding (-1)"
        )


def resolve(
    batch: int,
    length: int,
    *,
    attention_mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    segment_starts: Tensor | None = None,
) -> Tensor | None:
    """Turn whichever form the caller gave into `segment_starts`, or None for whole rows.

    Raises:
        InvalidInputError: more than one form was given, or its shape does not fit ``[B, T]``.
    """
    given = {
        "attention_mask": attention_mask,
        "lengths": lengths,
        "cu_seqlens": cu_seqlens,
        "document_ids": document_ids,
        "segment_starts": segment_starts,
    }
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise InvalidInputError(
            f"give at most one of {', '.join(given)}; got {' and '.join(names)}"
        )
    if attention_mask is not None:
        starts = from_attention_mask(attention_mask)
    elif lengths is not None:
        starts = from_lengths(lengths, batch, length)
    elif cu_seqlens is not None:
        if batch != 1:
            raise InvalidInputError(
                f"cu_seqlens describes one packed row, but the batch has {batch} rows; "
                "pack the rows into one, or pass document_ids"
            )
        starts = from_cu_seqlens(cu_seqlens, length)
    elif document_ids is not None:
        starts = from_document_ids(document_ids)
    else:
        assert segment_starts is not None
        starts = segment_starts.to(torch.int32)
        _check_starts(starts)
    if list(starts.shape) != [batch, length]:
        raise InvalidInputError(
            f"{names[0]} describes {list(starts.shape)} positions, expected [B, T] = "
            f"{[batch, length]}"
        )
    return starts
