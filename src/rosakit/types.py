"""Types that the operators share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Granularity = Literal["token", "run"]
Successor = Literal["available", "strict"]
Unmatched = Literal["zero", "self", "null"]
Backend = Literal["auto", "oracle", "cpu", "cuda", "pipeline"]

NO_MATCH = -1
"""Value of `Match.position` where nothing matched."""


class Match(NamedTuple):
    """Result of a suffix match (semantics section 2).

    Attributes:
        position: int32 ``[B, R, T]``: index of the successor that is read, always ``<= i``;
            -1 where nothing matched.
        length: int32 ``[B, R, T]``: length of the match in symbols (in runs for
            ``granularity="run"``); 0 where nothing matched.
        cf_position: int32 ``[B, R, T, M]`` or None: for each bit ``m`` the position that is
            matched when bit ``m`` of the query's last symbol is flipped (semantics 3.1). The
            unflipped bit's position is `position`.
    """

    position: Tensor
    length: Tensor
    cf_position: Tensor | None = None
