"""What addresses read that nothing trains: exact matches of token ids, or of hashed contexts.

Adapters of equal options find the same, so the first of a pass computes it and the others take it
from the context.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.layers.context import RosaContext
from rosakit.layers.hashing import context_codes
from rosakit.layers.selection import candidate_rows, candidate_tokens
from rosakit.ops.match import suffix_match
from rosakit.types import NO_MATCH, Granularity, Match, Successor

__all__ = ["ExactMatches"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class ExactMatches:
    """The exact matches of one kind of address; options as in `rosakit.layers.RosaAdapter`.

    Attributes:
        kind: "token", or "hash"; the codes of the latter may be refined by the adapter.
        routes: R.
        bits: of a hash code.
        granularity, successor, max_length, min_length: of a match.
        candidates: successors of token matches that the pass has to find.
        length_tiers: minimal lengths that the routes (of each candidate) take in turn; () for none.
        selects: a learned choice takes all candidates, instead of every route its own.
        hash_orders: tokens of a hashed context, dealt to the routes in turn.
        hash_seed: of the codes.
        backend: who matches the codes of whole sequences.
    """

    kind: Literal["token", "hash"]
    routes: int
    bits: int
    granularity: Granularity
    successor: Successor
    max_length: int | None
    min_length: int
    candidates: int
    length_tiers: tuple[int, ...]
    selects: bool
    hash_orders: tuple[int, ...]
    hash_seed: int
    backend: Literal["auto", "cpu", "cuda"]

    @property
    def name(self) -> tuple[Hashable, ...]:
        """Equal for those that find the same."""
        name: tuple[Hashable, ...] = (self.kind, self.min_length, self.length_tiers)
        if self.kind == "token":
            return (*name, self.candidates, self.routes)
        hashed = (self.routes, self.bits, self.hash_orders, self.hash_seed)
        return (*name, *hashed, self.granularity, self.successor, self.max_length)

    def codes(self, context: RosaContext) -> Tensor:
        """Hash codes ``[B, R, T]`` of this pass's token contexts."""

        def hashed() -> Tensor:
            return context_codes(
                context.windows(max(self.hash_orders)),
                self.hash_orders,
                routes=self.routes,
                bits=self.bits,
                seed=self.hash_seed,
            )

        name = ("codes", self.routes, self.bits, self.hash_orders, self.hash_seed)
        return _once(context, name, hashed)

    def match(self, context: RosaContext) -> Match:
        """What every route reads: ``[B, R, T]``, or ``[B, 1, T]`` where all read the same.

        In host memory when streaming.

        Raises:
            InvalidInputError: the pass does not know its tokens, or found too few candidates.
        """

        def found() -> Match:
            match = self._tokens_matched(context) if self.kind == "token" else self._coded(context)
            return self._long_enough(match)

        return _once(context, ("match", *self.name), found)

    def choices(self, context: RosaContext) -> Match:
        """What a learned choice takes from ``[B, K, T]``: matches of at least `min_length`.

        Raises:
            InvalidInputError: as for `match`.
        """
        found = self._tokens_matched(context)
        found = Match(found.position[:, : self.candidates], found.length[:, : self.candidates])
        return _without(found, found.length < self.min_length)

    def tokens(self, context: RosaContext, found: Match) -> Tensor:
        """Tokens of the choices, int64 ``[B, K, T]``."""
        name = ("tokens", self.candidates, self.min_length)
        return _once(context, name, lambda: candidate_tokens(context, found.position))

    def rows(self, context: RosaContext, found: Match) -> Tensor:
        """Rows of the output embedding for the choices, float32 ``[B, K, T, H]``."""
        name = ("rows", self.candidates, self.min_length)
        return _once(context, name, lambda: candidate_rows(context, self.tokens(context, found)))

    def _coded(self, context: RosaContext) -> Match:
        codes = self.codes(context)
        if context.states is not None:
            return context.states.codes(self, len(codes)).extend(codes, context.mask)
        return suffix_match(
            codes,
            codes,
            granularity=self.granularity,
            successor=self.successor,
            max_length=self.max_length,
            min_length=self.min_length,
            segment_starts=context.segment_starts,
            backend=self.backend,
        )

    def _tokens_matched(self, context: RosaContext) -> Match:
        match = context.token_match
        if match is None:
            raise InvalidInputError(
                "address='token' needs the token ids of this forward pass; call the model with "
                "input_ids instead of inputs_embeds, or use address='learned'"
            )
        if match.position.shape[1] < self.candidates:
            raise InvalidInputError(
                f"this forward pass found {match.position.shape[1]} candidates, the adapter reads "
                f"{self.candidates}; find as many (rosakit.attach does), or build it with fewer"
            )
        if self.candidates == 1 and not self.length_tiers:
            return Match(match.position[:, :1], match.length[:, :1])
        if self.selects:
            return match
        rank = torch.arange(self.routes, device=match.position.device) % self.candidates
        return Match(match.position[:, rank], match.length[:, rank])

    def _long_enough(self, match: Match) -> Match:
        """Leave out matches that are too short for their route."""
        least: int | Tensor = self.min_length
        if self.length_tiers:
            turn = torch.arange(self.routes) // self.candidates % len(self.length_tiers)
            tiers = torch.tensor(self.length_tiers).clamp(min=self.min_length)
            least = tiers[turn][None, :, None].to(match.length.device)
        return _without(match, match.length < least)


def _without(match: Match, out: Tensor) -> Match:
    return Match(match.position.masked_fill(out, NO_MATCH), match.length.masked_fill(out, 0))


def _once(context: RosaContext, name: tuple[Hashable, ...], compute: Callable[[], Found]) -> Found:
    """What is computed once a pass."""
    if name not in context.shared:
        context.shared[name] = compute()
    found: Found = context.shared[name]
    return found
