"""Which address options go together; shared by the adapter and the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rosakit.errors import InvalidInputError

MAX_ORDER = 64
"""Longest token context of a hash code."""


def check_address_options(
    address: str,
    *,
    estimator: str,
    estimator_options: Mapping[str, Any],
    learned: bool,
    shared_qk: bool,
    candidates: int,
    far_candidates: int,
    length_tiers: Sequence[int],
    select: int,
    select_tiers: Sequence[float],
    select_trust: bool,
    select_lens: bool,
    hash_orders: Sequence[int],
    hash_refine: bool,
    hash_scale: float,
    credit_margin: float | None,
) -> None:
    """Refuse options that mean nothing for the kind of address.

    Args:
        address: "learned", "token" or "hash".
        estimator, estimator_options: of the gradients; fixed addresses have none to estimate.
        learned: whether the addresses have trained projections.
        shared_qk, candidates, far_candidates, length_tiers, select, select_tiers, select_trust,
            select_lens, hash_orders, hash_refine, hash_scale, credit_margin: as in
            `rosakit.layers.RosaAdapter`.

    Raises:
        InvalidInputError: says which option does not fit and what to use instead.
    """
    if not learned and (estimator != "counterfactual" or estimator_options):
        raise InvalidInputError(
            f"estimator={estimator!r} and its options {dict(estimator_options)} are for bits that "
            f"learn, and address={address!r} has none that learn; leave both at their defaults, or "
            "use address='learned' or hash_refine"
        )
    if candidates < 1 or (candidates > 1 and address != "token"):
        raise InvalidInputError(
            f"candidates={candidates} rank the successors of token matches; use at least 1, and "
            "address='token' for more than 1"
        )
    if any(n < 1 for n in length_tiers) or (length_tiers and learned):
        raise InvalidInputError(
            f"length_tiers={tuple(length_tiers)} are minimal lengths (at least 1) of fixed "
            "matches; use address='token' or 'hash' without hash_refine, or min_length"
        )
    if not 0 <= far_candidates <= candidates:
        raise InvalidInputError(
            f"far_candidates={far_candidates} counts those of the candidates={candidates} beyond a "
            "distance; use 0 to candidates"
        )
    if select < 0 or (select and address != "token"):
        raise InvalidInputError(
            f"select={select} is the width of a learned choice among token matches; use "
            "address='token', or 0"
        )
    if any(not 0 <= share < 1 for share in select_tiers) or (select_tiers and not select):
        raise InvalidInputError(
            f"select_tiers={tuple(select_tiers)} are shares from 0 to below 1 that a learned "
            "choice has to reach; set select, or leave them empty"
        )
    if select_tiers and length_tiers:
        raise InvalidInputError(
            f"select_tiers={tuple(select_tiers)} ask for shares and "
            f"length_tiers={tuple(length_tiers)} for learned lengths; use one of them"
        )
    if not select_trust and not (select and length_tiers):
        raise InvalidInputError(
            "select_trust=False keeps length tiers apart from learned lengths; set select and "
            "length_tiers, or leave it at True"
        )
    if select_lens and not select:
        raise InvalidInputError(
            "select_lens is a feature of a learned choice; set select, or leave it out"
        )
    if not hash_orders or not all(1 <= n <= MAX_ORDER for n in hash_orders):
        raise InvalidInputError(
            f"hash_orders={tuple(hash_orders)} are the tokens of each context: one or more "
            f"numbers from 1 to {MAX_ORDER}"
        )
    if hash_refine and address != "hash":
        raise InvalidInputError("hash_refine refines hash codes; use it with address='hash'")
    if not hash_scale > 0:
        raise InvalidInputError(f"hash_scale must be above 0, got {hash_scale}")
    if shared_qk and not learned:
        raise InvalidInputError(
            "shared_qk shares learned projections; use address='learned', or 'hash' with "
            "hash_refine"
        )
    if credit_margin is not None and not (credit_margin > 0 and learned):
        raise InvalidInputError(
            f"credit_margin={credit_margin} limits the gradient of learned addresses; use a "
            "number above 0 with address='learned' or hash_refine, or None"
        )
