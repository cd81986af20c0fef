"""What one forward pass of the model tells every rosakit module in it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.layers.hashing import token_windows
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
        token_match: exact token-id matches of this chunk ``[B, K, T]``, best first, for
            ``address="token"``; in host memory when streaming.
        recent: each position's last tokens, int64 ``[reach, B, T]`` (see
            `rosakit.layers.hashing.token_windows`), for ``address="hash"``; streaming only.
        output_rows: weight ``[V, H]`` of the output embedding, for a selection with a lens.
        candidates: successor tokens of the best matches, for the token route.
        record_layers: the layers whose matches are kept when `record` is set; None for all.
        matches: filled by the adapters when `record` is set: layer index to its hard match
            (in host memory when streaming).
        keep_inputs: adapters with trained addresses leave what they read in `inputs`.
        inputs: layer index to the adapter's input ``[B, T, H]``, without its graph.
        short: whether decoding steps can take the short way of `rosakit.layers.step`; found out by
            the first.
        shared: what the first adapter computes and the others use again, by name.
    """

    input_ids: Tensor | None = None
    segment_starts: Tensor | None = None
    mask: Tensor | None = None
    states: RosaStates | None = None
    token_match: Match | None = None
    recent: Tensor | None = None
    output_rows: Tensor | None = None
    candidates: TokenCandidates | None = None
    record: bool = False
    record_layers: frozenset[int] | None = None
    matches: dict[int, Match] = field(default_factory=dict)
    keep_inputs: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)
    short: bool | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def records(self, layer_index: int) -> bool:
        """Whether this layer's match is to be kept."""
        return self.record and (self.record_layers is None or layer_index in self.record_layers)

    def windows(self, reach: int) -> Tensor:
        """Each position's last `reach` tokens, int64 ``[reach, B, T]``.

        Raises:
            InvalidInputError: the token ids of this pass are not known.
        """
        if self.recent is not None:
            return self.recent[:reach]
        if self.input_ids is None or self.states is not None:
            raise InvalidInputError(
                "address='hash' needs the token ids of this forward pass; call the model with "
                "input_ids instead of inputs_embeds, or use address='learned'"
            )
        return token_windows(self.input_ids, reach, self.segment_starts)
