"""Padding and packing of a forward pass, as transformers expresses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.ops import segments


def check_mask(mask: object, batch: int) -> None:
    """Refuse masks that do not say which positions are real.

    Raises:
        InvalidInputError: anything but None or a 2-D tensor with a row per sequence.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInputError(
            f"attention_mask must be 2-D, [{batch}, positions] with 1 for real tokens, got "
            f"{shape}; windows and documents follow from it, so ready-made 4-D masks are refused"
        )


def documents_of(named: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Document numbers ``[B, T]`` (negative at padding) that a call names; None if it names none.

    Args:
        named: the call's arguments: `document_ids`, ours, is taken out; so is `cu_seqlens`, for one
            row; transformers' own spelling `cu_seq_lens_q` stays, for kernels that read it.
        batch, length: B and T.

    Raises:
        InvalidInputError: lengths of several rows, or lengths that do not fit the row.
    """
    documents: Tensor | None = named.pop("document_ids", None)
    bounds = named.pop("cu_seqlens", None)
    if bounds is None:
        bounds = named.get("cu_seq_lens_q")
    if documents is not None or bounds is None:
        return documents
    if batch != 1:
        raise InvalidInputError(
            f"cu_seqlens describe one packed row, the batch has {batch}; pass document_ids "
            "[B, T], or pack into one row"
        )
    # Every position names its document's start, which is as good as a number.
    return segments.from_cu_seqlens(bounds, length)


def is_packed(mask: Tensor | None, position_ids: Tensor | None, length: int) -> bool:
    """Whether position ids restart inside a row: several documents in it.

    Without a mask any jump starts a document, as in transformers. With one, padding makes jumps
    too, so only a restart between two real positions counts.
    """
    if position_ids is None or position_ids.dim() != 2 or length < 2:
        return False
    return bool(_restarts(mask, position_ids, length).any())


def _restarts(mask: Tensor | None, position_ids: Tensor, length: int) -> Tensor:
    step = position_ids[:, 1:] - position_ids[:, :-1]
    if mask is None:
        return step != 1
    real = mask[:, -length:] != 0
    return (step <= 0) & real[:, 1:] & real[:, :-1]


def segments_of(
    mask: Tensor | None,
    position_ids: Tensor | None,
    documents: Tensor | None,
    packed: bool,
    batch: int,
    length: int,
) -> Tensor | None:
    """`segment_starts` int32 ``[B, T]`` of whole sequences, None for plain rows.

    Args:
        mask: ``[B, T]`` or None.
        position_ids: ``[B or 1, T]`` or None.
        documents: ``[B, T]`` document numbers, negative at padding, or None.
        packed: what `is_packed` said, or True with `documents`.
    """
    real = None if mask is None or bool(mask.all()) else mask != 0
    padding = None if real is None else segments.from_attention_mask(real)
    if not packed:
        return padding
    if documents is not None:
        starts = segments.resolve(batch, length, document_ids=documents)
        assert starts is not None
    else:
        assert position_ids is not None
        index = torch.arange(1, length, device=position_ids.device, dtype=torch.int32)
        new = _restarts(mask, position_ids, length)
        starts = torch.where(new, index, 0).cummax(1).values.to(torch.int32)
        starts = torch.cat([starts.new_zeros((starts.shape[0], 1)), starts], dim=1)
        starts = starts.expand(batch, -1)
    if padding is None:
        return starts.contiguous()
    both = torch.maximum(starts, padding)
    return torch.where((padding >= 0) & (starts >= 0), both, -1).to(torch.int32)


def chunk_mask(mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """Real positions of a chunk, bool ``[B, length]``; None if all are.

    Args:
        mask: ``[B, past + length]`` as generation passes it, or None.
        past: positions that the cache has seen.

    Raises:
        InvalidInputError: the mask does not cover cache and chunk.
    """
    if mask is None:
        return None
    if mask.shape[1] != past + length:
        raise InvalidInputError(
            f"attention_mask covers {mask.shape[1]} positions; the cache holds {past} and this "
            f"input {length}, so {past + length} were expected"
        )
    real = mask[:, past:] != 0
    return None if bool(real.all()) else real


def contiguous(real: Tensor) -> bool:
    """Whether the real positions of every row are neighbours (left or right padding only)."""
    rises = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return bool((rises <= 1).all())
