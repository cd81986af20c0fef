"""Learned lengths: a choice among exact matches that starts as the fixed one.

Fixed matches choose by length, then by recency, and length tiers read what is long enough. Here
each candidate ``c`` has a length in octaves that learning corrects,

    e(i, c) = log2 length_c + delta(i, c)

with ``delta`` from hidden states, length, distance and rank as in `rosakit.layers.selection`, and
from the model's logit of the candidate's token where there is a lens. Of each group of candidates
(those at any distance, and those beyond one) the longest by this measure is read, by the routes
whose tier ``t`` it reaches, ``e >= log2(t - 1/2)``. With ``delta = 0`` this is the fixed match
with length tiers, read for read; what is learned can only deviate from it.

The read is hard. Its gradient is that of the expectation over a softmax in nats, in which each
tier competes as reading nothing:

    share_t(c) = softmax over {e(i, 1), ..., e(i, K), log2(t - 1/2)}

Without trust the tiers ask for the match's own length instead: then learning says which candidate
is read, and never whether it is long enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rosakit.errors import InvalidInputError
from rosakit.layers.selection import Selection, selection_loss
from rosakit.types import NO_MATCH, Match

__all__ = ["LengthSelection"]

_RANK_STEP = 0.2
"""Octaves between candidates of equal length at the start, so that the latest wins."""
_NOTHING = 3.0
"""Octaves where the score of reading nothing starts, which teaching compares candidates with: near
where the surplus of source code has it, so that teaching does not begin by shifting all lengths."""


class LengthSelection(Selection):
    """Corrects the lengths of exact candidates; the longest of each group is read.

    Args:
        hidden_size: H, width of the hidden states.
        width: W, of each of the two products.
        groups: candidates of each group, in the order in which they come; route ``r`` reads the
            choice of group ``r mod G``.
        tiers: minimal lengths that the routes of each group take in turn.
        trust: tiers ask for the corrected length; False for the match's own.
        lens: correct by the model's own logits of the candidates' tokens as well.
        device: where the parameters live.
        dtype: their type.

    Raises:
        InvalidInputError: a width below 1, an empty group, or tiers below 1 or none.
    """

    pace = 10.0

    def __init__(
        self,
        hidden_size: int,
        width: int,
        groups: Sequence[int],
        tiers: Sequence[int],
        *,
        trust: bool = True,
        lens: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not groups or min(groups) < 1 or not tiers or min(tiers) < 1:
            raise InvalidInputError(
                "learned lengths need groups of at least one candidate and minimal lengths of at "
                f"least 1; got {tuple(groups)} and {tuple(tiers)}"
            )
        self.groups, self.lengths, self.trust = tuple(groups), tuple(tiers), trust
        super().__init__(
            hidden_size,
            width,
            sum(groups),
            lens=lens,
            groups=len(groups),
            device=device,
            dtype=dtype,
        )
        self.lens_weight = (
            nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if lens else None
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start: no correction, and the better rank wins among equal lengths."""
        super().reset_parameters()
        rank = torch.cat([torch.arange(size, dtype=torch.float32) for size in self.groups])
        self.rank_score.copy_(-_RANK_STEP / self.pace * rank)
        self.null_score.fill_(_NOTHING / self.pace)
        weight: nn.Parameter | None = getattr(self, "lens_weight", None)  # made after the rest
        if weight is not None:
            weight.zero_()

    def forward(
        self, u: Tensor, keys: Tensor, found: Match, distance: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Corrected lengths in octaves, float32 ``[B, T, K]``; -inf where there is no candidate.

        Args:
            u: ``[B, T, H]``.
            keys: ``[B, K, T, 2 W]``, of the candidates.
            found: their positions and lengths ``[B, K, T]``.
            distance: ``[B, K, T]``, tokens back to the position read.
            rows: float32 ``[B, K, T, H]``, the candidates' rows of the output embedding, for a
                lens.
        """
        delta = self.evidence(u, keys, found, distance)
        if self.lens is not None:
            assert rows is not None
            assert self.lens_weight is not None
            delta = delta + self.pace * self.lens_weight.float() * self.lens(u, rows)
        # One for all candidates of a group. Scaled, so that a step moves it as far as a table.
        shared = self.null(u).float().transpose(1, 2) / u.shape[-1] ** 0.5  # [B, G, T]
        delta = delta + torch.cat(
            [shared[:, g : g + 1].expand(-1, size, -1) for g, size in enumerate(self.groups)],
            1,
        )
        octaves = _octaves(found.length) + delta
        return octaves.masked_fill(found.position < 0, -torch.inf).transpose(1, 2)

    def choose(
        self, log_share: Tensor, found: Match, routes: int, token: Tensor | None = None
    ) -> Match:
        """What each route reads: position and length int32 ``[B, R, T]``.

        Args:
            log_share: corrected lengths ``[B, T, K]``.
            found: the candidates ``[B, K, T]``.
            routes: R.
            token: not used; candidates of a group differ.
        """
        chosen, begin = [], 0
        for size in self.groups:
            best = log_share[..., begin : begin + size].detach().max(-1)
            rank = (best.indices + begin)[:, None]
            position, length = found.position.gather(1, rank), found.length.gather(1, rank)
            # Compared with Python numbers: a tensor of tiers would be a copy to the GPU.
            octaves = best.values if self.trust else _octaves(length[:, 0])
            refused = torch.stack([octaves < _least(tier) for tier in self.lengths], 1)
            refused = refused | (position < 0)
            chosen.append(
                (
                    torch.where(refused, NO_MATCH, position),
                    torch.where(refused, 0, length),
                )
            )
            begin += size
        # Route r: group r mod G, tier r // G mod N.
        return Match(
            *(
                torch.stack(parts, 2)
                .flatten(1, 2)
                .repeat(1, -(-routes // (len(self.groups) * len(self.lengths))), 1)[:, :routes]
                .to(torch.int32)
                for parts in zip(*chosen, strict=True)
            )
        )

    def expected_reads(
        self, log_share: Tensor, found: Match, routes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions ``[B, R, T]`` that might be read and their shares ``[B, T, R]``."""
        count, tiers = len(self.groups), len(self.lengths)
        shares, begin = [], 0
        for size in self.groups:
            octaves = log_share[..., begin : begin + size]
            begin += size
            if not self.trust:
                shares.append(octaves.softmax(-1).nan_to_num()[..., None, :])
                continue
            nothing = torch.stack(
                [torch.full_like(octaves[..., :1], _least(tier)) for tier in self.lengths], -2
            )
            octaves = octaves[..., None, :].expand(-1, -1, tiers, -1)
            shares.append(torch.cat([octaves, nothing], -1).softmax(-1))  # [B, T, N, size + 1]
        turns = -(-routes // (count * tiers))
        for rank in range(max(self.groups)):
            positions, parts, begin = [], [], 0
            for size, share in zip(self.groups, shares, strict=True):
                place = begin + min(rank, size - 1)
                begin += size
                position = found.position[:, place, None].expand(-1, tiers, -1)
                if not self.trust:
                    octaves = _octaves(found.length[:, place])
                    short = [octaves < _least(tier) for tier in self.lengths]
                    position = position.masked_fill(torch.stack(short, 1), NO_MATCH)
                positions.append(position)
                part = share[..., rank] if rank < size else torch.zeros_like(share[..., 0])
                parts.append(part.expand(-1, -1, tiers))
            # Route r: group r mod G, tier r // G mod N.
            read = torch.stack(positions, 2).flatten(1, 2).repeat(1, turns, 1)[:, :routes]
            part = torch.stack(parts, -1).flatten(2).repeat(1, 1, turns)[..., :routes]
            yield read, part

    def loss(
        self,
        log_share: Tensor,
        position: Tensor,
        input_ids: Tensor,
        *,
        segment_starts: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Mean nats of choosing right in each group; see `selection_loss`."""
        total, begin = log_share.new_zeros(()), 0
        for group, size in enumerate(self.groups):
            part = slice(begin, begin + size)
            begin += size
            nothing = (self.pace * self.null_score[group]).float().expand(*log_share.shape[:2], 1)
            shares = torch.cat([log_share[..., part], nothing], -1).log_softmax(-1)
            total = total + selection_loss(
                shares, position[:, part], input_ids, segment_starts=segment_starts, known=known
            )
        return total / len(self.groups)


def _octaves(length: Tensor) -> Tensor:
    return torch.log2(length.clamp(min=1).float())


def _least(tier: int) -> float:
    """Octaves halfway between the lengths that a tier refuses and those that it takes."""
    return math.log2(tier - 0.5)
