"""Learned selection: which exact match to read, and whether to trust it.

Exact token matches offer a few candidates: the best distinct successors and the best one beyond a
distance. What is learned is the address itself: projections of the query's hidden state and of the
candidates' hidden states score every candidate against the others and against reading nothing,

    s(i, p) = (a_i . b_p + c_i . d_(p-1)) / sqrt(W) + length + rank + distance + z_i . E[x_p]
    share   = softmax over {s(i, p_1), ..., s(i, p_K), null_i}

with ``p`` the position that would be read: ``b_p`` knows what followed the matched context and
``d_(p-1)`` how that context ended. With a lens, ``z_i`` is a learned map of the hidden state and
``E[x_p]`` the row of the output embedding for the token that would be read: the logit that the
model itself gives this token, as far as this layer knows it. The candidate with the largest share
is read, hard. A route reads it only where the share reaches the route's own tier, so the output
projection sees how far a read can be trusted, as length tiers show it for fixed matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.errors import InvalidInputError
from rosakit.layers.projection import Projection
from rosakit.layers.token_route import length_bucket
from rosakit.types import NO_MATCH, Match

if TYPE_CHECKING:
    from rosakit.layers.context import RosaContext

__all__ = ["Lens", "Selection", "candidate_rows", "candidate_tokens", "selection_loss"]

_LENGTHS = 24
_DISTANCES = 24
"""Octaves of the distance; the last is open."""


class Selection(nn.Module):
    """Scores exact candidates against each other and against reading nothing.

    At the start no hidden state counts, but for a lens, and the better rank wins: the fixed match.
    A lens starts as the plain one, which at upper layers chooses better than rank. Query maps are
    zero then and have a gradient at the first step, key maps from the second on.

    Args:
        hidden_size: H, width of the hidden states.
        width: W, of each of the two products.
        candidates: K.
        tiers: shares that the routes ask for in turn; () for reading everywhere.
        lens: score candidates by the model's own logits of their tokens as well.
        groups: choices that are made apart from each other, each with a score of reading nothing.
        device: where the parameters live.
        dtype: their type.

    Raises:
        InvalidInputError: a width below 1, or tiers outside 0..1.
    """

    pace = 1.0
    """Factor of the tables: how much faster than a weight of a projection a score may learn."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        candidates: int,
        tiers: tuple[float, ...] = (),
        *,
        lens: bool = False,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or any(not 0 <= tier < 1 for tier in tiers):
            raise InvalidInputError(
                f"a selection needs a width of at least 1 and tiers from 0 to below 1; got {width} "
                f"and {tiers}"
            )
        self.width, self.candidates, self.tiers = width, candidates, tuple(tiers)
        self.query = Projection(hidden_size, 2 * width, device=device, dtype=dtype)
        self.key = Projection(hidden_size, 2 * width, device=device, dtype=dtype)
        self.null = Projection(hidden_size, groups, device=device, dtype=dtype)

        self.lens = Lens(hidden_size, width, device=device, dtype=dtype) if lens else None

        def table(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.length_score, self.distance_score = table(_LENGTHS), table(_DISTANCES)
        self.rank_score, self.null_score = table(candidates), table(groups)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start: the first candidate, or what a plain lens says with the ranks."""
        self.query.reset(zero=True)
        self.null.reset(zero=True)
        self.key.reset()
        for score in (self.length_score, self.distance_score, self.null_score):
            score.zero_()
        if self.lens is not None:
            self.lens.reset_parameters()
        rank = torch.arange(self.candidates, dtype=torch.float32)
        self.rank_score.copy_(1.0 - rank)

    def keys(self, u: Tensor) -> Tensor:
        """What later positions compare themselves with: float32 ``[B, T, 2 W]``."""
        keys: Tensor = self.key(u)
        return keys.float()

    def gather(self, keys: Tensor, position: Tensor) -> Tensor:
        """Keys of the candidates ``[B, K, T, 2 W]`` of a whole sequence.

        Args:
            keys: ``[B, T, 2 W]``.
            position: ``[B, K, T]``, positions that would be read, negative where none.
        """
        batch, count, length = position.shape
        read = position.clamp(min=0).to(torch.int64).view(batch, -1, 1)
        halves = [
            half.gather(1, place.expand(-1, -1, self.width))
            for half, place in zip(
                keys.split(self.width, -1), (read, (read - 1).clamp(min=0)), strict=True
            )
        ]
        return torch.cat(halves, -1).view(batch, count, length, -1)

    def forward(
        self, u: Tensor, keys: Tensor, found: Match, distance: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Log shares ``[B, T, K + 1]`` in float32, the last of reading nothing; -inf where none.

        Args:
            u: ``[B, T, H]``.
            keys: ``[B, K, T, 2 W]``, of the candidates.
            found: their positions and lengths ``[B, K, T]``.
            distance: ``[B, K, T]``, tokens back to the position read.
            rows: float32 ``[B, K, T, H]``, the candidates' rows of the output embedding, for a
                lens.
        """
        score = self.evidence(u, keys, found, distance)
        if self.lens is not None:
            assert rows is not None
            score = score + self.lens(u, rows)
        score = score.masked_fill(found.position < 0, -torch.inf)
        null = self.null(u).float() + self.null_score.float()
        return torch.cat([score.transpose(1, 2), null], -1).log_softmax(-1)

    def evidence(self, u: Tensor, keys: Tensor, found: Match, distance: Tensor) -> Tensor:
        """What hidden states, lengths, distances and ranks say: float32 ``[B, K, T]``."""
        query = self.query(u).float()[:, None]
        score: Tensor = (query * keys).sum(-1) / self.width**0.5
        octave = torch.log2(distance.clamp(min=1).float()).floor().clamp(max=_DISTANCES - 1)
        looked_up = (
            _looked_up(self.length_score, length_bucket(found.length))
            + _looked_up(self.distance_score, octave.to(torch.int64))
            + self.rank_score.float()[:, None]
        )
        return score + self.pace * looked_up

    def choose(
        self, log_share: Tensor, found: Match, routes: int, token: Tensor | None = None
    ) -> Match:
        """What each route reads: position and length int32 ``[B, R, T]``.

        Candidates of one token say the same of what follows, so tiers ask for the sum of their
        shares, and of the token with the largest sum the candidate with the largest share is read.

        Args:
            log_share: ``[B, T, K + 1]``.
            found: the candidates ``[B, K, T]``.
            routes: R.
            token: int64 ``[B, K, T]``, the tokens of the candidates; None if all differ.
        """
        share = log_share[..., :-1].detach().exp()
        trust = share
        if token is not None:
            alike = token.transpose(1, 2)
            same = alike[..., :, None] == alike[..., None, :]
            trust = (share[..., None, :] * same).sum(-1)
        trust = trust.masked_fill(found.position.transpose(1, 2) < 0, -1.0)
        best = trust.amax(-1)  # [B, T]
        rank = share.masked_fill(trust < best[..., None], -1.0).argmax(-1)
        position = found.position.gather(1, rank[:, None])
        length = found.length.gather(1, rank[:, None])
        # Compared with Python numbers: a tensor of tiers would be a copy to the GPU, which waits.
        weak = torch.stack([best < tier for tier in self.tiers or (0.0,)], 1)
        weak = weak.repeat(1, -(-routes // weak.shape[1]), 1)[:, :routes]
        refused = weak | (position < 0)
        return Match(
            torch.where(refused, NO_MATCH, position).to(torch.int32),
            torch.where(refused, 0, length).to(torch.int32),
        )

    def expected_reads(
        self, log_share: Tensor, found: Match, routes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions ``[B, R, T]`` that might be read and their shares ``[B, T, R or 1]``.

        The expectation of the hard read is the sum over them; its gradient credits the choice.
        """
        share = log_share.exp()
        for rank in range(self.candidates):
            yield found.position[:, rank : rank + 1].expand(-1, routes, -1), share[..., rank, None]

    def loss(
        self,
        log_share: Tensor,
        position: Tensor,
        input_ids: Tensor,
        *,
        segment_starts: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Mean nats of choosing right; see `selection_loss`."""
        return selection_loss(
            log_share, position, input_ids, segment_starts=segment_starts, known=known
        )


class Lens(nn.Module):
    """Logits of chosen tokens from a lower layer's hidden state: ``(u + g * u + W u) . E[x]``.

    It starts as the plain lens, ``g = 0`` and ``W = 0``; `rank` is that of ``W``. The gain is kept
    as a difference from 1, since bfloat16 has no small steps there.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.shift = Projection(hidden_size, hidden_size, rank, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The plain lens."""
        self.gain.zero_()
        self.shift.reset(zero=True)

    def forward(self, u: Tensor, rows: Tensor) -> Tensor:
        """Float32 ``[B, K, T]`` from ``u [B, T, H]`` and ``rows [B, K, T, H]``."""
        state = u.float() + (u * self.gain + self.shift(u)).float()
        logits: Tensor = (state[:, None] * rows).sum(-1)
        return logits


def candidate_tokens(context: RosaContext, position: Tensor) -> Tensor:
    """Tokens int64 at ``position [B, K, T]`` of the pass, on the device of its ids.

    Args:
        context: of the pass; its tokens are those of `input_ids`, or of the token stream when
            streaming.
        position: negative where there is no candidate; any token stands there.
    """
    assert context.input_ids is not None
    place = position.clamp(min=0).to(torch.int64)
    if context.states is not None:
        assert context.states.token is not None
        return context.states.token.at(place).to(context.input_ids.device)
    ids = context.input_ids.to(torch.int64)
    return ids.gather(1, place.flatten(1)).view_as(place)


def candidate_rows(context: RosaContext, token: Tensor) -> Tensor:
    """The output embedding's rows of ``token [B, K, T]``: float32 ``[B, K, T, H]``.

    Raises:
        InvalidInputError: this process does not hold the whole output embedding.
    """
    table = context.output_rows
    if table is None or table.is_meta or type(table) is not Tensor or table.dim() != 2:
        raise InvalidInputError(
            "select_lens reads rows of the output embedding, but this pass has no whole one; use a "
            "model with an output embedding that is not sharded, or select_lens=False"
        )
    return F.embedding(token.to(table.device), table).float().to(token.device)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` as a product: indexing has a slow backward pass for so few entries."""
    one_hot = index[..., None] == torch.arange(len(table), device=index.device)
    return one_hot.float() @ table.float()


def selection_loss(
    log_share: Tensor,
    position: Tensor,
    input_ids: Tensor,
    *,
    segment_starts: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Mean nats of choosing right: a candidate that is the next token, or nothing if none is.

    With `known` it is the likelihood of the next token under the mixture of what is read and what
    the model says anyway,

        -log (sum_{c right} share_c + share_nothing p(next token)),

    so a candidate is worth what the model lacks: where it is sure of the next token, choosing the
    candidate that says the same and choosing nothing are alike.

    Args:
        log_share: ``[B, T, K + 1]`` of `Selection`.
        position: ``[B, K, T]``, the candidates.
        input_ids: ``[B, T]``.
        segment_starts: int32 ``[B, T]`` or None.
        known: float32 ``[B, T]``, log probability of the next token without the read, or None.

    Returns:
        A scalar in float32; 0 where no position has a candidate.
    """
    batch, count, length = position.shape
    follows = torch.roll(input_ids, -1, 1)
    counted = torch.ones_like(input_ids, dtype=torch.bool)
    counted[:, -1] = False
    if segment_starts is not None:
        starts = segment_starts.to(input_ids.device)
        counted &= (starts == torch.roll(starts, -1, 1)) & (starts >= 0)
    place = position.clamp(min=0).to(torch.int64).view(batch, -1)
    token = input_ids.gather(1, place).view(batch, count, length)
    right = ((token == follows[:, None]) & (position >= 0)).transpose(1, 2)
    low = torch.finfo(log_share.dtype).min
    nothing = ~right.any(-1, keepdim=True)
    if known is not None:
        nothing = torch.ones_like(nothing)
        log_share = torch.cat([log_share[..., :-1], log_share[..., -1:] + known[..., None]], -1)
    nats = -log_share.masked_fill(~torch.cat([right, nothing], -1), low).logsumexp(-1)
    asked = counted & (position >= 0).any(1)
    return torch.where(asked, nats, 0).sum() / asked.sum().clamp(min=1)
