"""The referee: semantics section 2 in plain quadratic torch, one obvious line at a time.

Every other backend is tested against these functions; they favour being read over being fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.types import NO_MATCH, Granularity, Match, Successor, Unmatched


def suffix_match_oracle(
    q: Tensor,
    k: Tensor,
    *,
    granularity: Granularity = "token",
    successor: Successor = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Tensor | None = None,
    counterfactual_bits: int = 0,
) -> Match:
    """Longest earlier match of the current suffix, latest on ties, for every position.

    Args:
        q: integer symbols ``[B, R, T]``.
        k: the same shape.
        granularity: "token" or "run".
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long.
        min_length: a shorter best match is no match.
        segment_starts: int32 ``[B, T]`` or None; see `rosakit.ops.segments`.
        counterfactual_bits: number ``M`` of low bits of the query's last symbol to flip.

    Returns:
        `Match` of int32 tensors.
    """
    batch, routes, length = q.shape
    q, k = q.to(torch.int64), k.to(torch.int64)
    bits = counterfactual_bits
    position = torch.full((batch, routes, length), NO_MATCH, dtype=torch.int32, device=q.device)
    match_length = torch.zeros_like(position)
    cf = torch.full((batch, routes, length, bits), NO_MATCH, dtype=torch.int32, device=q.device)
    solve = _match_tokens if granularity == "token" else _match_runs
    for row, begin, end in _segments(segment_starts, batch, length):
        span = slice(begin, end)
        for route in range(routes):
            # [1 + M, t]: the factual match first, then one row a flipped bit.
            at, size = solve(q[row, route, span], k[row, route, span], successor, max_length, bits)
            null = size < min_length
            at = torch.where(null, NO_MATCH, at + begin)
            position[row, route, span] = at[0]
            match_length[row, route, span] = torch.where(null, 0, size)[0]
            cf[row, route, span] = at[1:].T
    return Match(position, match_length, cf if bits else None)


def _segments(starts: Tensor | None, batch: int, length: int) -> Iterator[tuple[int, int, int]]:
    """The (row, begin, end) of every segment."""
    for row in range(batch):
        if starts is None:
            yield row, 0, length
            continue
        values = starts[row].tolist()
        for begin in sorted({value for value in values if value >= 0}):
            yield row, begin, begin + values.count(begin)


def _latest_longest(lcs: Tensor, max_length: int | None) -> tuple[Tensor, Tensor]:
    """Of candidates ``lcs [..., n]`` the largest (capped) value and its last index."""
    if lcs.shape[-1] == 0:
        empty = torch.zeros(lcs.shape[:-1], dtype=torch.int64, device=lcs.device)
        return empty, empty
    if max_length is not None:
        lcs = lcs.clamp(max=max_length)
    order = lcs * lcs.shape[-1] + torch.arange(lcs.shape[-1], device=lcs.device)
    best = order.argmax(dim=-1)
    return best, lcs.gather(-1, best.unsqueeze(-1)).squeeze(-1)


def _extend(previous: Tensor, symbol: Tensor, keys: Tensor) -> Tensor:
    """One row of the dynamic programme: ``lcs(i, j) = (q_i == k_j) * (lcs(i - 1, j - 1) + 1)``.

    Args:
        previous: ``[n]``, lcs of the previous query symbol with every key.
        symbol: ``[m]``, alternatives for the current query symbol.
        keys: ``[n]``.

    Returns:
        ``[m, n]``.
    """
    shifted = torch.cat([previous.new_zeros(1), previous[:-1]])
    return (symbol[:, None] == keys) * (shifted + 1)


def _alternatives(symbol: Tensor, bits: int) -> Tensor:
    """The symbol itself, then the symbol with each of its low `bits` bits flipped: ``[1 + M]``."""
    return torch.stack([symbol, *(symbol ^ (1 << bit) for bit in range(bits))])


def _match_tokens(
    q: Tensor, k: Tensor, successor: Successor, max_length: int | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Token granularity for one stream ``[t]``: positions and lengths ``[1 + M, t]``."""
    position = torch.zeros((1 + bits, len(q)), dtype=torch.int64, device=q.device)
    length = torch.zeros_like(position)
    lcs = torch.zeros_like(k)
    for i in range(len(q)):
        rows = _extend(lcs, _alternatives(q[i], bits), k)
        best, size = _latest_longest(rows[:, :i], max_length)  # candidates 0 <= j < i
        position[:, i], length[:, i] = best + 1, size
        lcs = rows[0]
    return position, length


def _runs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximal runs of ``x [t]``: their symbols, their starts, and the run of every position."""
    change = torch.ones_like(x, dtype=torch.bool)
    change[1:] = x[1:] != x[:-1]
    return x[change], change.nonzero().flatten(), change.cumsum(0) - 1


def _match_runs(
    q: Tensor, k: Tensor, successor: Successor, max_length: int | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Run granularity for one stream ``[t]`` (semantics 2.1): as `_match_tokens`."""
    position = torch.zeros((1 + bits, len(q)), dtype=torch.int64, device=q.device)
    length = torch.zeros_like(position)
    query_runs, _, run_of_query = _runs(q)
    key_runs, key_starts, run_of_key = _runs(k)
    lcs = torch.zeros_like(key_runs)
    for i in range(len(q)):
        first_of_run = i == 0 or run_of_query[i] != run_of_query[i - 1]
        if first_of_run:
            rows = _extend(lcs, _alternatives(query_runs[run_of_query[i]], bits), key_runs)
            lcs = rows[0]
        newest = int(run_of_key[i])  # rcap(i): the last key run that has started
        candidates = newest if successor == "available" else newest + 1
        best, size = _latest_longest(rows[:, :candidates], max_length)
        size = torch.where(best + 1 <= newest, size, 0)  # the successor run has not started
        position[:, i] = key_starts[(best + 1).clamp(max=len(key_starts) - 1)]
        length[:, i] = size
        if not first_of_run:
            # Inside a run no single flip is defined: the factual match stands for every bit.
            position[:, i], length[:, i] = position[0, i].clone(), length[0, i].clone()
    return position, length


def retrieve_oracle(
    v: Tensor,
    position: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    unmatched: Unmatched = "zero",
    e_null: Tensor | None = None,
) -> Tensor:
    """Read value bits at matched positions: ``y = e0 + (e1 - e0) * vbit`` (semantics 2).

    Args:
        v: ``[B, T, C]`` real values; a bit is 1 where ``v > 0``.
        position: int ``[B, R, T]`` from a match, ``C = R * bits``.
        e0: ``[C]``.
        e1: ``[C]``.
        bits: bits per route.
        unmatched: what a position without match gives: exact zeros, its own value, or `e_null`.

    Returns:
        ``[B, T, C]`` in the dtype of `e0`.
    """
    channel_position = position.repeat_interleave(bits, dim=1).transpose(1, 2).to(torch.int64)
    matched = channel_position >= 0
    own = torch.arange(v.shape[1], device=v.device)[None, :, None]
    source = torch.where(matched, channel_position, own)
    value = symbols.binarize(v).gather(1, source)
    y = torch.where(value, e1, e0)
    if unmatched == "self":
        return y
    if unmatched == "null":
        assert e_null is not None
        return torch.where(matched, y, e_null)
    return torch.where(matched, y, torch.zeros_like(y))
