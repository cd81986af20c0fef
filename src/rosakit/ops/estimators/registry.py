"""The table of estimators, and the options that all of them take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.types import Backend, Granularity, Match, Successor


class MatchOptions(NamedTuple):
    """How streams are matched; see `rosakit.ops.suffix_match`.

    Attributes:
        given: the match itself, where it was found ahead (`rosakit.ops.ahead`).
    """

    granularity: Granularity = "token"
    successor: Successor = "available"
    max_length: int | None = None
    min_length: int = 1
    segment_starts: Tensor | None = None
    backend: Backend = "auto"
    given: Match | None = None


Estimator: TypeAlias = Callable[..., tuple[Tensor, Match]]
"""``estimator(q, k, v, e0, e1, *, bits, match, unmatched, e_null, **options) -> (y, match)``.

`q`, `k`, `v` and `y` are ``[B, T, C]``, `e0`, `e1` and `e_null` ``[C]``; `match` is a
`MatchOptions` on the way in and the hard `rosakit.ops.Match` on the way out.
"""

_SHARED = ("q", "k", "v", "e0", "e1", "bits", "match", "unmatched", "e_null")
_estimators: dict[str, Estimator] = {}
_softened: set[str] = set()


def register(name: str, *, softened: bool = False) -> Callable[[Estimator], Estimator]:
    """Decorator that enters an estimator into the table.

    Args:
        name: its name.
        softened: its forward is not the hard one, unless `tau` is None or with `straight_through`.

    Raises:
        InvalidInputError: the name is taken.
    """

    def enter(estimator: Estimator) -> Estimator:
        if name in _estimators:
            raise InvalidInputError(f"an estimator named {name!r} is registered already")
        _estimators[name] = estimator
        if softened:
            _softened.add(name)
        return estimator

    return enter


def names() -> list[str]:
    """Names of the registered estimators."""
    return sorted(_estimators)


def get(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        InvalidInputError: there is none.
    """
    if name not in _estimators:
        raise InvalidInputError(f"unknown estimator {name!r}; known are {', '.join(names())}")
    return _estimators[name]


def hard_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with which the estimator's forward is the hard one, which decodes."""
    if name not in _softened or options.get("straight_through"):
        return options
    return {**options, "tau": None}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that the estimator does not take.

    Raises:
        InvalidInputError: names the unknown options and the known ones.
    """
    known = [p for p in inspect.signature(get(name)).parameters if p not in _SHARED]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidInputError(
            f"estimator {name!r} does not take {', '.join(unknown)}; "
            f"its options are {', '.join(known) or 'none'}"
        )
