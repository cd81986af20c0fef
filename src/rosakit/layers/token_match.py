"""Exact matching of token ids: candidates for the token route, addresses for adapters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosakit import native
from rosakit.errors import InvalidInputError, InvalidTypeError, warn_once
from rosakit.ops.match import suffix_match
from rosakit.types import NO_MATCH, Match

NO_KEY = 2**31 - 1
"""A symbol that no token id equals: where keys have not arrived yet."""


class TokenCandidates(NamedTuple):
    """The K best distinct successors of every position (semantics section 5).

    Attributes:
        token: int64 ``[B, T, K]``; 0 where there are fewer than K (see `length`).
        length: int32 ``[B, T, K]``, match length in tokens; 0 marks an empty place.
        distance: int32 ``[B, T, K]``, tokens back to the successor, 0 for the current token.
    """

    token: Tensor
    length: Tensor
    distance: Tensor


def best_successors(
    input_ids: Tensor,
    candidates: int,
    *,
    segment_starts: Tensor | None = None,
    min_length: int = 1,
) -> Match:
    """Positions and lengths of the K best distinct successors among earlier positions.

    Args:
        input_ids: integer ``[B, T]``.
        candidates: K, at least 1.
        segment_starts: int32 ``[B, T]`` or None.
        min_length: shorter matches are left out.

    Returns:
        A `Match` whose `position` and `length` are int32 ``[B, T, K]``, best first.

    Raises:
        InvalidInputError: wrong shape, K < 1, or ids outside int32.
        InvalidTypeError: ids that are not integers.
    """
    if input_ids.dim() != 2:
        raise InvalidInputError(f"input_ids must have shape [B, T], got {list(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise InvalidTypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if candidates < 1:
        raise InvalidInputError(f"candidates must be at least 1, got {candidates}")
    position, length = torch.ops.rosakit.best_successors(
        input_ids.detach(), candidates, segment_starts, min_length
    )
    return Match(position, length)


@torch.library.custom_op("rosakit::best_successors", mutates_args=())
def _best_successors_op(
    input_ids: Tensor, candidates: int, segment_starts: Tensor | None, min_length: int
) -> tuple[Tensor, Tensor]:
    ids = input_ids.to("cpu", torch.int32).contiguous()
    starts = None if segment_starts is None else segment_starts.to("cpu", torch.int32).contiguous()
    if native.available():
        arrays = native.best_successors(
            ids.numpy(),
            candidates,
            segment_starts=None if starts is None else starts.numpy(),
            min_length=min_length,
        )
        position, length = (torch.from_numpy(a) for a in arrays)
    else:
        warn_once("rosakit: the compiled core is missing, so token candidates are found slowly")
        position, length = best_successors_naive(ids, candidates, starts, min_length)
    return position.to(input_ids.device), length.to(input_ids.device)


@_best_successors_op.register_fake
def _(
    input_ids: Tensor, candidates: int, segment_starts: Tensor | None, min_length: int
) -> tuple[Tensor, Tensor]:
    position = input_ids.new_empty((*input_ids.shape, candidates), dtype=torch.int32)
    return position, torch.empty_like(position)


def best_successors_naive(
    ids: Tensor, candidates: int, segment_starts: Tensor | None, min_length: int
) -> tuple[Tensor, Tensor]:
    """Quadratic form of `best_successors`: rank every earlier position, keep new tokens."""
    batch, length = ids.shape
    position = torch.full((batch, length, candidates), -1, dtype=torch.int32)
    size = torch.zeros_like(position)
    for b in range(batch):
        tokens = ids[b].tolist()
        starts = [0] * length if segment_starts is None else segment_starts[b].tolist()
        lcs: dict[int, int] = {}
        for i in range(length):
            if starts[i] < 0:
                continue
            begin = starts[i]
            lcs = {
                j: lcs.get(j - 1, 0) + 1 if j > begin else 1
                for j in range(begin, i)
                if tokens[j] == tokens[i]
            }
            seen: set[int] = set()
            for j in sorted(lcs, key=lambda j: (lcs[j], j), reverse=True):
                if lcs[j] >= min_length and tokens[j + 1] not in seen and len(seen) < candidates:
                    position[b, i, len(seen)], size[b, i, len(seen)] = j + 1, lcs[j]
                    seen.add(tokens[j + 1])
    return position, size


def distant_match(
    input_ids: Tensor, distance: int, *, segment_starts: Tensor | None = None
) -> Match:
    """The longest, latest match whose successor lies at least `distance` tokens back.

    Keys arrive `distance` tokens late, so that nearer ones cannot hide them.

    Args:
        input_ids: ``[B, T]``, token ids below ``2**31 - 1``.
        distance: in tokens, at least 0.
        segment_starts: int32 ``[B, T]`` or None.

    Returns:
        Position and length int32 ``[B, 1, T]``.
    """
    ids = input_ids.to(torch.int32)
    own = torch.arange(ids.shape[1], device=ids.device)
    start = torch.zeros_like(ids) if segment_starts is None else segment_starts.to(ids.device)
    there = (start >= 0) & (own - distance >= start)
    late = torch.where(there, ids[:, (own - distance).clamp(min=0)], NO_KEY)
    found = suffix_match(
        ids[:, None].contiguous(), late[:, None].contiguous(), segment_starts=segment_starts
    )
    matched = found.position >= 0
    return Match(torch.where(matched, found.position - distance, NO_MATCH), found.length)


SEARCHED = 16
"""Best distinct successors among which further distant ones are looked for."""


def further_matches(best: Match, far: Match, back: Tensor, distance: int, count: int) -> Match:
    """Distant candidates beside the best one: other successors, as good as they come.

    Args:
        best: the best distinct successors ``[B, K, T]``, best first.
        far: `distant_match` ``[B, 1, T]``, which is left out.
        back: ``[B, K, T]``, tokens back to `best`.
        distance: in tokens; nearer ones are left out.
        count: N, how many are wanted.

    Returns:
        Position and length int32 ``[B, N, T]``, best first.
    """
    # The successor that `far` reads is among `best` at that very place, or at a nearer one.
    usable = (best.position >= 0) & (back >= distance) & (best.position != far.position)
    order = (~usable).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    kept = usable.gather(1, order)
    return Match(
        torch.where(kept, best.position.gather(1, order), NO_MATCH),
        torch.where(kept, best.length.gather(1, order), 0),
    )


def gather_candidates(input_ids: Tensor, found: Match) -> TokenCandidates:
    """Turn positions of a whole sequence into tokens and distances.

    Args:
        input_ids: ``[B, T]``.
        found: result of `best_successors` on them.
    """
    position = found.position.to(torch.int64)
    batch, length, k = position.shape
    valid = position >= 0
    token = input_ids.to(torch.int64).gather(1, position.clamp(min=0).view(batch, -1))
    own = torch.arange(length, device=position.device)[None, :, None]
    distance = torch.where(valid, own - position, 0)
    return TokenCandidates(
        torch.where(valid, token.view(batch, length, k), 0),
        found.length,
        distance.to(torch.int32),
    )
