"""What the softened estimators share: every earlier position weighs in, through one softmax.

For a query ``i`` and each candidate key ``j`` of its segment, with ``s_ij = q_i . k_j``::

    a[i, j] = gate(slope * s_ij + bias)                   how equal the two symbols are, in [0, 1]
    x[i, j] = recurrence of a along the diagonal i - j    how long the suffixes agree, softly
    z[i, j] = score(x[i, j])
    y[i]    = sum_j p[i, j] w[j + 1] + p[i, null] null[i],  p = softmax over {j} and null

Recurrences (a cell outside the candidates has ``a = x = t = c = 0``):

* ``dp``    ``x[i, j] = a (x[i-1, j-1] + 1)``                             rosa_soft, 2025-10-26
* ``scan``  ``t = t[i-1, j-1] + a; c = max(c[i-1, j-1], t (1 - a)); x = t - c``       2025-10-30

Scores, with ``n = i - s`` and ``m = j - s`` counted from the segment's start ``s``:

* ``length``   ``z = (min(x, cap) + m / (n + 1)) / tau``, null ``(min_length - 1 + n / (n + 1)) /
  tau``: the recency term breaks ties towards the latest, and the null sits between no match and
  the shortest match that counts.
* ``utility``  ``z = scale (sqrt(1 + x) - 1) / (sqrt(2) - 1) - log N_i``, null ``scale / 2``, with
  ``N_i`` candidates                                                         rosa_soft, 2026-08

With ``offset = 0`` (October 2025) ``j = i`` is a candidate, ``w[j]`` is read and there is no null.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gate = Literal["sigmoid", "identity", "exp"]
Recurrence = Literal["dp", "scan"]
Score = Literal["length", "utility"]

UTILITY = 1.0 / (math.sqrt(2.0) - 1.0)


class Form(NamedTuple):
    """One member of the family; see the module's equations.

    Attributes:
        gate, slope, bias: symbol equality from the inner product.
        recurrence, score: as above.
        sharpness: ``1 / tau`` for "length", `scale` for "utility".
        offset: 1: key ``j < i``, value ``j + 1``; 0: key ``j <= i``, value ``j``, no null.
        cap: "length" only: lengths count as at most this (0: no cap).
        window: "dp" only: agreement further back than this many symbols is ignored (0: none is).
        min_length: "length" only: where the null sits.
        dropout: share of the weights dropped.
    """

    gate: Gate
    slope: float
    bias: float
    recurrence: Recurrence
    score: Score
    sharpness: float
    offset: int = 1
    cap: int = 0
    window: int = 0
    min_length: int = 1
    dropout: float = 0.0


def attend_naive(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    seed: Tensor | None = None,
) -> Tensor:
    """The module's equations on dense ``[..., T, T]`` matrices, differentiable by autograd.

    Args:
        q, k: symbols made real, ``[B, R, T, M]``.
        w: values ``[B, R, T, V]``.
        null: ``[B, R, T, V]``, or None for zeros.
        starts: int32 ``[B, T]``; see `rosakit.ops.segments`.
        seed: int64 ``[1]``, names the dropped weights.

    Returns:
        ``[B, R, T, V]``; zeros at padding.
    """
    length = q.shape[2]
    allowed, origin = candidates(starts, length, form.offset, q.device)
    a = gate(form, q @ k.transpose(-1, -2)) * allowed
    x = windowed(a, form.window) if form.window else recur(a, allowed, form.recurrence)
    z, z_null = scores(x, allowed, origin, form)
    if form.offset:
        z = torch.cat([z, z_null.expand(*z.shape[:-1], 1)], dim=-1)
    p = z.softmax(-1)
    if seed is not None and form.dropout:
        p = p * kept(p.shape[0] * p.shape[1], length, form.dropout, seed).view_as(p)
    y = p[..., : length - form.offset] @ w[..., form.offset :, :]
    if form.offset and null is not None:
        y = y + p[..., -1:] * null
    return y * (origin >= 0)[..., None]


def candidates(
    starts: Tensor | None, length: int, offset: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which keys a query may see, bool ``[B or 1, 1, T, T]``, and segment starts ``[.., 1, T]``."""
    own = torch.arange(length, device=device)
    origin = torch.zeros_like(own)[None, None] if starts is None else starts[:, None].long()
    seen = (own <= own[:, None] - offset) & (own >= origin[..., None])
    return seen & (origin >= 0)[..., None], origin


def gate(form: Form, product: Tensor) -> Tensor:
    """Symbol equality of every pair."""
    s = form.slope * product + form.bias
    if form.gate == "sigmoid":
        return s.sigmoid()
    return s.exp() if form.gate == "exp" else s


def recur(a: Tensor, allowed: Tensor, recurrence: Recurrence) -> Tensor:
    """Soft run lengths along the diagonals of ``a [..., T, T]``, row after row."""
    x = t = c = torch.zeros_like(a[..., 0, :])
    linked = allowed & shift(allowed)  # the cell before is in the same segment
    out = []
    for i in range(a.shape[-2]):
        row = a[..., i, :]
        if recurrence == "dp":
            x = row * (shift(x) * linked[..., i, :] + 1)
        else:
            t = (shift(t) * linked[..., i, :] + row) * allowed[..., i, :]
            before = shift(c) * linked[..., i, :]
            top = t * (1 - row)  # ties belong to the latest, as in torch.cummax
            c = torch.where(top >= before, top, before)
            x = t - c
        out.append(x)
    return torch.stack(out, dim=-2)


def shift(x: Tensor) -> Tensor:
    """``out[..., j] = x[..., j - 1]``, 0 at ``j = 0``."""
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], dim=-1)


def windowed(a: Tensor, window: int) -> Tensor:
    """``sum over r = 1..window of a[i, j] a[i-1, j-1] ... a[i-r+1, j-r+1]``."""
    product = total = a
    for _ in range(1, min(window, a.shape[-1])):
        product = a * torch.nn.functional.pad(product[..., :-1, :-1], (1, 0, 1, 0))
        total = total + product
    return total


def scores(
    x: Tensor, allowed: Tensor, origin: Tensor, form: Form, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the candidates, -inf elsewhere, and of the null ``[..., rows, 1]``.

    `rows`: which queries `x` holds; None for all.
    """
    own = torch.arange(x.shape[-1], device=x.device)
    seen = ((own if rows is None else rows) - origin).to(x.dtype)[..., None]  # n
    if form.score == "length":
        recency = (own - origin[..., None]).to(x.dtype) / (seen + 1)
        x = x.clamp(max=form.cap) if form.cap else x
        z = form.sharpness * (x + recency)
        z_null = form.sharpness * (form.min_length - 1 + seen / (seen + 1))
    else:
        z = form.sharpness * UTILITY * ((1 + x).sqrt() - 1) - seen.clamp(min=1).log()
        z_null = torch.full_like(seen, form.sharpness / 2)
    # A row of padding has no candidate; zeros keep its softmax finite, and its output is dropped.
    return z.masked_fill(~allowed & (origin >= 0)[..., None], -math.inf), z_null


# --- dropout: a counter-based hash, so that one saved seed names every dropped weight ------------

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The avalanche of a 32-bit word (murmur3's finaliser), in int64 arithmetic."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def kept(streams: int, length: int, dropout: float, seed: Tensor) -> Tensor:
    """Factors ``0`` or ``1 / (1 - dropout)`` of the weights, ``[B * R, T, T + 1]``: null last."""
    sizes = (streams, length, length + 1)
    stream, i, j = (torch.arange(n, device=seed.device, dtype=torch.int64) for n in sizes)
    return kept_at(stream[:, None, None], i[:, None], j, dropout, seed)


def kept_at(stream: Tensor, i: Tensor, j: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Factors of the weights at int64 coordinates; ``j = T`` is the null."""
    word = _mix(stream ^ (seed & _MASK))
    word = _mix((word + i * 0x9E3779B9) & _MASK)
    word = _mix((word + j * 0x85EBCA77) & _MASK)
    return (word >= threshold(dropout)).to(torch.float32) / (1 - dropout)


def threshold(dropout: float) -> int:
    """A weight is dropped where its 32-bit word is below this."""
    return min(int(dropout * 2**32), _MASK)
