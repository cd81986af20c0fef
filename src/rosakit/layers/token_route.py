"""The token route: exact token memory mixed into the output distribution (semantics section 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.errors import InvalidInputError
from rosakit.layers.token_match import TokenCandidates

__all__ = ["TokenCandidates", "TokenRoute", "mixed_log_prob"]

_LENGTH_BUCKETS = 24
"""Half-octave buckets of the match length: 1, 2, 3, 4-5, 6-7, 8-11, … the last is open."""

START_LOGIT = 3.0
"""The gate starts at sigmoid(-3), about 5%: visible to the loss, small enough to be safe."""


def length_bucket(length: Tensor) -> Tensor:
    """Bucket ``floor(2 log2 l)`` of each match length, clamped to the table; 0 for length 0."""
    octave = torch.log2(length.clamp(min=1).to(torch.float32))
    # 1e-4 keeps exact powers of two in their own bucket whatever log2's last bit says.
    return (2 * octave + 1e-4).floor().clamp(max=_LENGTH_BUCKETS - 1).to(torch.int64)


class TokenRoute(nn.Module):
    """A gate between the language model and the successors of exact token matches.

    ``p = g_keep p_lm + sum_k g_k onehot(c_k)`` with ``g = softmax over {keep, 1..K}`` of a score
    of: the hidden state, the match length (half-octave buckets), ``log p_lm(c_k)``, the log
    distance, and the rank. The score is linear in these plus a small tanh layer over them that
    starts at zero, so that the total gate starts at ``sigmoid(-3)`` whatever the candidates.

    Args:
        hidden_size: width of the hidden states that the output embedding reads.
        candidates: K, distinct successors that compete.
        units: width of the tanh layer; 0 leaves the linear score alone.
        min_length: shorter matches are no candidates.
        retrieve: False is the control: every candidate becomes the position's own token, with all
            parameters and features unchanged, so that nothing is retrieved.
        device: where the parameters live; they are float32 whatever the model's dtype.

    Shapes:
        hidden ``[B, T, H]``, logits ``[B, T, V]``, candidates ``[B, T, K]`` each.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        candidates: int = 4,
        units: int = 16,
        min_length: int = 1,
        retrieve: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or candidates < 1 or units < 0 or min_length < 1:
            raise InvalidInputError(
                "TokenRoute needs hidden_size >= 1, candidates >= 1, units >= 0 and min_length "
                f">= 1; got {hidden_size}, {candidates}, {units} and {min_length}"
            )
        self.hidden_size = hidden_size
        self.candidates = candidates
        self.min_length = min_length
        self.retrieve = retrieve
        # Kept in float32 whatever the model's dtype: a few hundred numbers that gate every token.
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        # One number as a vector: FSDP shards no scalars.
        self.keep_bias = nn.Parameter(torch.full((1,), START_LOGIT, **options))
        self.length_score = nn.Parameter(torch.zeros(_LENGTH_BUCKETS, **options))
        self.rank_score = nn.Parameter(torch.zeros(candidates, **options))
        self.feature_score = nn.Parameter(torch.zeros(2, **options))
        self.hidden_score = nn.Parameter(torch.zeros(hidden_size, **options))
        self.length_code = nn.Parameter(torch.zeros(_LENGTH_BUCKETS, units, **options))
        self.feature_code = nn.Parameter(torch.zeros(2, units, **options))
        self.unit_bias = nn.Parameter(torch.zeros(units, **options))
        self.unit_score = nn.Parameter(torch.zeros(units, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start: scores zero, the tanh layer random inside and silent outside."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.keep_bias.fill_(START_LOGIT)
            nn.init.normal_(self.length_code, std=0.5)
            nn.init.normal_(self.feature_code, std=0.5)
            nn.init.normal_(self.unit_bias, std=0.5)

    def gate(self, hidden: Tensor, log_p: Tensor, found: TokenCandidates) -> tuple[Tensor, Tensor]:
        """Log gates: ``log g_keep [B, T]`` and ``log g_k [B, T, K]`` (-inf at empty places).

        Args:
            hidden: ``[B, T, H]``.
            log_p: ``[B, T, K]``, the model's own log probability of each candidate.
        """
        valid = found.length > 0
        bucket = length_bucket(found.length)
        # Features of order one: nats / 4, octaves of distance around 2**8 / 4.
        features = torch.stack(
            [
                log_p.detach().float().clamp(min=-20) / 4 + 1,
                torch.log2(found.distance.float() + 1) / 4 - 2,
            ],
            dim=-1,
        )
        # Normalised, so that the gate's learning rate does not depend on the model's scale.
        normed = F.rms_norm(hidden.detach().float(), (self.hidden_size,)) / math.sqrt(
            self.hidden_size
        )
        units = torch.tanh(self.length_code[bucket] + features @ self.feature_code + self.unit_bias)
        score = (
            self.length_score[bucket]
            + self.rank_score[: found.length.shape[-1]]
            + features @ self.feature_score
            + units @ self.unit_score
            + (normed @ self.hidden_score)[..., None]
        )
        score = score.masked_fill(~valid, -math.inf)
        # log(number of candidates) makes the starting gate independent of how many there are.
        count = valid.sum(-1, keepdim=True).clamp(min=1).float()
        keep = self.keep_bias + count.log()
        log_gate = torch.log_softmax(torch.cat([keep, score], dim=-1), dim=-1)
        return log_gate[..., 0], log_gate[..., 1:]

    def forward(self, hidden: Tensor, logits: Tensor, found: TokenCandidates) -> Tensor:
        """Mixed log probabilities ``[B, T, V]``, in the dtype of `logits`.

        A position without candidates keeps the model's distribution exactly (up to the
        normalisation of `logits` to log probabilities).
        """
        if found.token.shape[:2] != hidden.shape[:2]:
            raise InvalidInputError(
                f"candidates of {list(found.token.shape[:2])} positions do not fit hidden states "
                f"of {list(hidden.shape[:2])}"
            )
        work = logits.float()
        normalizer = work.logsumexp(dim=-1, keepdim=True)
        log_p = work.gather(-1, found.token) - normalizer
        log_keep, log_copy = self.gate(hidden, log_p, found)
        raised = mixed_log_prob(found.token, log_p, log_keep, log_copy, found)
        gain = torch.where(_first_places(found), raised - (log_p + log_keep[..., None]), 0.0)
        # One pass over the vocabulary: normalise, scale by the gate, raise the candidates.
        mixed = (work + (log_keep[..., None] - normalizer)).scatter_add(-1, found.token, gain)
        return mixed.to(logits.dtype)

    def own_value_candidates(self, input_ids: Tensor, found: TokenCandidates) -> TokenCandidates:
        """The control's candidates: the current token in every place that holds one.

        Args:
            input_ids: ``[...]``, the current tokens.
            found: the candidates ``[..., K]``.
        """
        own = input_ids.to(torch.int64)[..., None].expand_as(found.token)
        return TokenCandidates(torch.where(found.length > 0, own, 0), found.length, found.distance)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, candidates={self.candidates}, "
            f"min_length={self.min_length}, retrieve={self.retrieve}"
        )


def mixed_log_prob(
    asked: Tensor, log_p: Tensor, log_keep: Tensor, log_copy: Tensor, found: TokenCandidates
) -> Tensor:
    """Log probability of chosen tokens under the mixture (semantics section 5), ``[..., M]``.

    ``log(g_keep p_lm(x) + sum of g_k over candidates k that are x)``, differentiable, with finite
    gradients where there are no candidates.

    Args:
        asked: int64 ``[..., M]``, the tokens.
        log_p: ``[..., M]``, the model's own log probability of each.
        log_keep, log_copy: log gates ``[...]`` and ``[..., K]`` of `TokenRoute.gate`.
        found: the candidates ``[..., K]``.
    """
    valid = found.length > 0
    same = (asked[..., :, None] == found.token[..., None, :]) & valid[..., None, :]
    # exp(-1e4) is exactly 0 and, unlike -inf, keeps every gradient finite.
    finite = torch.where(valid, log_copy, -1e4)
    copied = finite[..., None, :].masked_fill(~same, -1e4).logsumexp(-1)
    return torch.logaddexp(log_p + log_keep[..., None], copied)


def _first_places(found: TokenCandidates) -> Tensor:
    """The first of the places that hold one token, bool ``[..., K]``; empty places are none.

    Distinct tokens are the rule; the control repeats its own.
    """
    valid = found.length > 0
    same = (found.token[..., :, None] == found.token[..., None, :]) & valid[..., None, :]
    own = torch.arange(valid.shape[-1], device=valid.device)
    return valid & (same.to(torch.int8).argmax(-1) == own)
