"""Teaching addresses directly: positions that ought to find each other should share their symbols.

A retrieval that never happened gives no gradient to the projections that could have caused it.
Here every route learns to tell the right earlier position from others by a softened comparison of
symbols (InfoNCE, van den Oord et al. 2018, over the relaxed codes ``tanh(x)`` of learned hashing):

    s(i, j) = sum_m tanh(q[i, m]) tanh(k[j, m])
    loss(i) = -log sum_{j right} exp s(i, j) + log sum_{j seen} exp s(i, j)

Who is right comes either from the text (the token that follows ``j`` is the one that follows
``i``) or from a teacher (`AttentionTargets`): what the same frozen model with full attention reads
beyond the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError


class AddressTargets(NamedTuple):
    """Who ought to find whom.

    Routes are dealt to ``G`` groups in turn: route ``r`` learns from group ``r % G``.

    Attributes:
        queries: int64 ``[B, A]``, sampled query positions.
        keys: int64 ``[B, G, K]``, positions whose key symbols are compared.
        right: bool ``[B, G, A, K]``, the keys that a query ought to match.
        seen: bool ``[B, G, A, K]``, the keys that it is compared with; includes `right`.
        weight: float32 ``[B, G, A]``, how much a query counts.
    """

    queries: Tensor
    keys: Tensor
    right: Tensor
    seen: Tensor
    weight: Tensor


def address_loss(q: Tensor, k: Tensor, targets: AddressTargets, *, bits: int) -> Tensor:
    """Mean contrastive loss of one layer's addresses, in nats a comparison.

    Args:
        q: ``[B, T, C]``, floating point, before it is cut into bits.
        k: ``[B, T, C]``.
        targets: sampled comparisons.
        bits: bits per route.

    Returns:
        A scalar in float32; 0 where nothing can be compared.
    """
    groups = targets.keys.shape[1]
    routes = q.shape[-1] // bits
    if routes < groups:
        raise InvalidInputError(
            f"{routes} routes cannot learn from {groups} groups of targets; use more routes"
        )
    total = q.new_zeros((), dtype=torch.float32)
    for group in range(groups):
        # [B, A or K, routes of this group, M]
        queries = _codes(q, targets.queries, bits)[:, :, group::groups]
        keys = _codes(k, targets.keys[:, group], bits)[:, :, group::groups]
        score = torch.einsum("barm,bkrm->brak", queries, keys).float()
        seen, right = targets.seen[:, None, group], targets.right[:, None, group]
        low = torch.finfo(score.dtype).min
        every = score.masked_fill(~seen, low).logsumexp(-1)
        chosen = score.masked_fill(~right, low).logsumexp(-1)
        weight = targets.weight[:, None, group] * right.any(-1)  # [B, 1, A]
        share = (routes - group + groups - 1) // groups / routes
        count = weight.sum() * score.shape[1]
        total = total + share * (weight * (every - chosen)).sum() / count.clamp(min=1e-6)
    return total


def _codes(x: Tensor, positions: Tensor, bits: int) -> Tensor:
    picked = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1])).tanh()
    return picked.view(*picked.shape[:-1], -1, bits)


def next_token_targets(
    input_ids: Tensor, samples: int, *, segment_starts: Tensor | None = None
) -> AddressTargets:
    """Positions with the same next token ought to find each other.

    Each sampled query brings two keys: an earlier position that the same token follows, drawn at
    random, and an earlier position of the current token, which is right only if the same token
    follows it too. Every query is compared with all of them that precede it.

    Args:
        input_ids: ``[B, T]``.
        samples: A, queries a row (fewer in rows shorter than that).
        segment_starts: int32 ``[B, T]`` or None.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    start = torch.zeros_like(input_ids) if segment_starts is None else segment_starts.to(device)
    start = start.to(torch.int64)
    follows = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
    known = (start >= 0) & (start == torch.cat([start[:, 1:], start[:, :1]], dim=1))
    known[:, -1] = False
    same_next = _earlier(follows, start, known)
    same_token = _earlier(input_ids, start, known)
    # Only queries that have a right key are worth a comparison.
    score = torch.rand((batch, length), device=device) - 2.0 * (same_next < 0)
    queries = score.topk(min(samples, length), dim=1).indices
    keys = torch.cat([same_next.gather(1, queries), same_token.gather(1, queries)], dim=1)
    there, keys = keys >= 0, keys.clamp(min=0)
    seen = (keys[:, None] < queries[..., None]) & there[:, None]
    seen &= start.gather(1, keys)[:, None] == start.gather(1, queries)[..., None]
    agree = follows.gather(1, keys)[:, None] == follows.gather(1, queries)[..., None]
    weight = (same_next.gather(1, queries) >= 0).float()
    return AddressTargets(
        queries, keys[:, None], (seen & agree)[:, None], seen[:, None], weight[:, None]
    )


def _earlier(values: Tensor, start: Tensor, known: Tensor) -> Tensor:
    """For each position a random earlier one of its segment with the same value, or -1.

    Args:
        values: int64 ``[B, T]``.
        start: int64 ``[B, T]``, first position of the segment, -1 at padding.
        known: bool ``[B, T]``, positions that take part.
    """
    length = values.shape[1]
    own = torch.arange(length, device=values.device).expand_as(values)
    # One sortable number for each (segment, value); equal ones stay in order of position.
    width = int(values.max()) + 1 if values.numel() else 1
    name = torch.where(known, (start + 1) * width + values, -1)
    order = name.argsort(dim=1, stable=True)
    ordered = name.gather(1, order)
    first = torch.searchsorted(ordered, ordered)  # where the run of equal names begins
    rank = own - first
    drawn = first + (torch.rand(rank.shape, device=values.device) * rank).to(torch.int64)
    found = order.gather(1, drawn).masked_fill((rank == 0) | (ordered < 0), -1)
    return torch.full_like(found, -1).scatter(1, order, found)


class AttentionTargets:
    """What full attention reads beyond the window: the teacher's side of distillation.

    Args:
        queries: int64 ``[B, A]``, sampled query positions.
        window: distance from which on a key counts as beyond the window.
        sink_tokens: first tokens of a segment that never count.
        segment_starts: int32 ``[B, T]`` or None.

    Attributes:
        layers: layer index to its targets, one group a head.
    """

    def __init__(
        self,
        queries: Tensor,
        window: int,
        sink_tokens: int,
        segment_starts: Tensor | None = None,
        wanted: tuple[int, ...] | None = None,
    ) -> None:
        self.queries, self.window, self.sink_tokens = queries, window, sink_tokens
        self.segment_starts, self.wanted = segment_starts, wanted
        self.layers: dict[int, AddressTargets] = {}

    @torch.no_grad()
    def see(self, layer: int, query: Tensor, key: Tensor, scaling: float | None) -> None:
        """Take in one layer's attention.

        Args:
            layer: its index; ignored unless it is wanted.
            query: ``[B, H, T, D]``, as attention uses it.
            key: ``[B, G, T, D]``.
            scaling: factor of the scores; None for ``D ** -0.5``.
        """
        if self.wanted is not None and layer not in self.wanted:
            return
        batch, heads, length, width = query.shape
        asked = self.queries
        picked = query.gather(2, asked[:, None, :, None].expand(-1, heads, -1, width)).float()
        keys = key.float().repeat_interleave(heads // key.shape[1], dim=1)
        scale = width**-0.5 if scaling is None else scaling
        score = picked @ keys.transpose(2, 3) * scale  # [B, H, A, T]
        own = torch.arange(length, device=query.device)
        start = torch.zeros_like(own).expand(batch, length)
        if self.segment_starts is not None:
            start = self.segment_starts.to(query.device, torch.int64)
        begin = start.gather(1, asked)[..., None]  # [B, A, 1]
        visible = (own <= asked[..., None]) & (start[:, None] == begin) & (begin >= 0)
        share = score.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num()
        far = visible & (asked[..., None] - own >= self.window)
        # The successor of the matched key is read, so the key is one before what attention reads.
        far &= own >= begin + max(self.sink_tokens, 1)
        beyond = share * far[:, None]
        mass, best = beyond.sum(-1), beyond.argmax(-1)
        matched = (best - 1).clamp(min=0)  # [B, H, A]: as many keys as queries
        right = matched[:, :, None] == matched[..., None]
        seen = (matched[:, :, None] < asked[:, None, :, None]) & (mass > 0)[:, :, None]
        seen = seen & (
            start[:, None].expand(-1, heads, -1).gather(2, matched)[:, :, None] == begin[:, None]
        )
        self.layers[layer] = AddressTargets(asked, matched, right & seen, seen, mass)


def sample_queries(
    input_ids: Tensor, samples: int, *, segment_starts: Tensor | None = None, after: int = 0
) -> Tensor:
    """Random query positions ``[B, A]`` that have at least `after` tokens of their segment before.

    Rows without enough such positions are filled up with others.
    """
    batch, length = input_ids.shape
    own = torch.arange(length, device=input_ids.device).expand(batch, length)
    rank = own
    if segment_starts is not None:
        starts = segment_starts.to(own.device, torch.int64)
        rank = torch.where(starts >= 0, own - starts, -1)
    score = torch.rand((batch, length), device=own.device) - 2.0 * (rank < after)
    return score.topk(min(samples, length), dim=1).indices
