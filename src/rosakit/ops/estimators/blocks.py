"""The windowed form in linear memory: blocks of rows, each recomputed in the backward pass.

With a window the evidence at row ``i`` needs the last ``window`` rows only, so a block of rows is
weighed from its own strip of the matrix. Suffix products over a window are doubled::

    S_{m+n}[i, j] = S_m[i, j] + P_m[i, j] S_n[i-m, j-m],  P_{m+n}[i, j] = P_m[i, j] P_n[i-m, j-m]

with ``S_1 = P_1 = a``, so a window takes about ``2 log2(window)`` steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rosakit.ops.estimators.pairwise import Form, gate, kept_at, scores

BUDGET = 1 << 25
"""Cells of the matrix held at once (a few float32 copies of each)."""


def attend_blocks(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    seed: Tensor | None = None,
    *,
    budget: int = BUDGET,
) -> Tensor:
    """`pairwise.attend_naive` for a form with a window, never holding more than a block.

    Args:
        q, k: ``[B, R, T, M]``; w, null: ``[B, R, T, V]``.
        starts: int32 ``[B, T]``.
        budget: cells held at once; a single stream's block of ``window`` rows is the least.

    Returns:
        ``[B, R, T, V]``.
    """
    batch, routes, length, _ = q.shape
    if length == 0:
        return torch.zeros_like(w)
    rows = max(1, min(length, max(form.window, budget // max(1, 2 * length))))
    streams = max(1, min(routes, budget // ((rows + form.window) * length)))
    out = []
    for b in range(batch):
        own = None if starts is None else starts[b]
        parts = []
        for r in range(0, routes, streams):
            some = slice(r, r + streams)
            done = []
            for first in range(0, length, rows):
                last = min(length, first + rows)
                before = max(0, first - form.window + 1)
                y = checkpoint(
                    _block,
                    q[b, some, before:last],
                    k[b, some, :last],
                    w[b, some, : last + 1],
                    None if null is None else null[b, some, first:last],
                    own,
                    form,
                    seed,
                    (b * routes + r, before, first, length),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                done.append(y)
            parts.append(torch.cat(done, 1))
        out.append(torch.cat(parts))
    return torch.stack(out)


def _block(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    null: Tensor | None,
    starts: Tensor | None,
    form: Form,
    seed: Tensor | None,
    place: tuple[int, int, int, int],
) -> Tensor:
    """Rows ``first`` on, from queries ``[S, rows, M]`` that start at ``before``."""
    stream, before, first, length = place
    last = before + q.shape[1]
    i = torch.arange(before, last, device=q.device)
    j = torch.arange(last, device=q.device)
    origin = torch.zeros_like(i) if starts is None else starts[before:last].long()
    allowed = (j <= i[:, None] - form.offset) & (j >= origin[:, None]) & (origin >= 0)[:, None]
    a = gate(form, q @ k.transpose(-1, -2)) * allowed
    x = evidence(a, form.window)[:, first - before :]
    allowed, origin = allowed[first - before :], origin[first - before :]
    z, z_null = scores(x, allowed, origin, form, i[first - before :])
    p = torch.cat([z, z_null.expand(*z.shape[:-1], 1)], -1).softmax(-1)
    if seed is not None and form.dropout:
        streams = torch.arange(stream, stream + q.shape[0], device=q.device)[:, None, None]
        rows = i[first - before :, None]
        columns = torch.cat([j, j.new_tensor([length])])
        p = p * kept_at(streams, rows, columns, form.dropout, seed)
    values = w[:, 1:]
    if values.shape[1] < last:  # the last position has no successor, and no row reads it
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    y = p[..., :-1] @ values
    if null is not None:
        y = y + p[..., -1:] * null
    return y * (origin >= 0)[:, None]


def evidence(a: Tensor, window: int) -> Tensor:
    """``sum over r < window of a[i, j] ... a[i-r, j-r]`` for ``a [..., rows, keys]``."""
    total: Tensor | None = None
    product: Tensor | None = None
    size = 0  # of what `total` covers
    step_total = step_product = a
    step = 1
    while True:
        if window & step:
            if total is None or product is None:
                total, product, size = step_total, step_product, step
            else:
                total = total + product * _earlier(step_total, size)
                product = product * _earlier(step_product, size)
                size += step
        if 2 * step > window:
            assert total is not None
            return total
        step_total = step_total + step_product * _earlier(step_total, step)
        step_product = step_product * _earlier(step_product, step)
        step *= 2


def _earlier(x: Tensor, by: int) -> Tensor:
    """Cell ``(i - by, j - by)``; zeros before the first row and key."""
    rows, keys = x.shape[-2:]
    by = min(by, rows, keys)
    kept = x[..., : rows - by, : keys - by]
    return torch.nn.functional.pad(kept, (by, 0, by, 0))
