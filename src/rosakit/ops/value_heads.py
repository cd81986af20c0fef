"""Grouped value heads: several neighbouring routes read one head."""

from __future__ import annotations

from torch import Tensor

from rosakit.errors import InvalidInputError


def check_value_groups(groups: int, routes: int) -> None:
    """Refuse a number of routes a value head that leaves some without.

    Raises:
        InvalidInputError: below 1, or no divisor of the number of routes.
    """
    if groups < 1 or routes % groups:
        raise InvalidInputError(
            f"value_groups must divide the number of routes ({routes}), got {groups}"
        )


def share_values(v: Tensor, groups: int, bits: int) -> Tensor:
    """Grouped value heads: `groups` neighbouring routes read one value head.

    Args:
        v: ``[B, T, C / groups]``.

    Returns:
        ``[B, T, C]``, each head of `bits` channels repeated `groups` times; the gradient of a head
        is the sum over the routes that read it.
    """
    heads: Tensor = v.unflatten(2, (-1, bits))
    return heads.repeat_interleave(groups, dim=2).flatten(2)
