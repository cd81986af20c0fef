"""What one forward pass of the model tells every rosakit module in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from rosakit.types import Match

if TYPE_CHECKING:
    from rosakit.layers.state import RosaStates
    from rosakit.layers.token_route import TokenCandidates


@dataclass
class RosaContext:
    """Per-forward facts, shared by all adapters and the token route.

    Attributes:
        input_ids: ``[B, T]`` token ids of this chunk, where known.
        segment_starts: int32 ``[B, T]``, see `rosakit.ops.segments`; whole sequences only.
        mask: bool ``[B, T]``, real positions of this chunk; streaming only.
        states: the streaming states when a cache is in use, else None.
        token_match: exact token-id match of this chunk ``[B, 1, T]``, for ``address="token"``; in
            host memory when streaming.
        candidates: successor tokens of the best matches, for the token route.
        matches: filled by the adapters when `record` is set: layer index to its hard match
            (in host memory when streaming).
    """

    input_ids: Tensor | None = None
    segment_starts: Tensor | None = None
    mask: Tensor | None = None
    states: RosaStates | None = None
    token_match: Match | None = None
    candidates: TokenCandidates | None = None
    record: bool = False
    matches: dict[int, Match] = field(default_factory=dict)
