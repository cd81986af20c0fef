"""The address loss of a training step: who teaches the addresses, and what it costs them.

Adapters leave what they computed their addresses from; queries and keys are computed from it once
more, cut off from the layers below, so that the loss trains the addresses and nothing else. It
works under gradient checkpointing as well, since nothing of the checkpointed graph is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaContext
from rosakit.layers.selection import selection_loss
from rosakit.layers.supervision import (
    AddressTargets,
    AttentionTargets,
    address_loss,
    next_token_targets,
    sample_queries,
)
from rosakit.tuning.attach import adapters_of, controller_of
from rosakit.tuning.modules import decoder_of

__all__ = ["AddressTeacher"]


class AddressTeacher:
    """Computes the address loss of a model's learned addresses.

    Args:
        kind: "next_token" or "teacher" (see `rosakit.layers.supervision`).
        samples: queries a sequence.

    Raises:
        InvalidInputError: an unknown kind.
    """

    def __init__(self, kind: str, samples: int) -> None:
        if kind not in ("next_token", "teacher"):
            raise InvalidInputError(f"kind must be 'next_token' or 'teacher', got {kind!r}")
        self.kind, self.samples = kind, samples

    def loss(self, model: Any, context: RosaContext, inputs: dict[str, Any]) -> Tensor:
        """Mean loss over the layers whose inputs the pass left.

        Args:
            model: an attached model.
            context: of a recorded pass with `keep_inputs`.
            inputs: what the decoder was called with, for the teacher's pass.
        """
        adapters = adapters_of(model)
        wanted = {i: adapters[i] for i in sorted(context.inputs)}
        ids = context.input_ids
        if ids is None or not wanted:
            raise InvalidInputError(
                "the address loss found no learned addresses in this pass; it needs input_ids and "
                "adapters with address='learned', hash_refine or select"
            )
        learned = tuple(i for i, adapter in wanted.items() if adapter.selection is None)
        targets = self._targets(model, context, ids, inputs, learned) if learned else {}
        total = torch.zeros((), device=ids.device)
        for index, adapter in wanted.items():
            if adapter.selection is not None:
                share, found = adapter.selection_shares(context.inputs[index], context)
                total = total + selection_loss(
                    share, found.position, ids, segment_starts=context.segment_starts
                )
                continue
            q, k = adapter.addresses(context.inputs[index], context)
            total = total + address_loss(q, k, targets[index], bits=adapter.bits)
        return total / len(wanted)

    def _targets(
        self,
        model: Any,
        context: RosaContext,
        ids: Tensor,
        inputs: dict[str, Any],
        layers: tuple[int, ...],
    ) -> dict[int, AddressTargets]:
        starts = context.segment_starts
        if self.kind == "next_token":
            found = next_token_targets(ids, self.samples, segment_starts=starts)
            return dict.fromkeys(layers, found)
        controller = controller_of(model)
        window = controller.config.window
        if window is None:
            raise InvalidInputError("the teacher shows what lies beyond the window; set a window")
        queries = sample_queries(ids, self.samples, segment_starts=starts, after=window)
        teacher = AttentionTargets(queries, window, controller.config.sink_tokens, starts, layers)
        controller.teacher = teacher
        try:
            with torch.no_grad():
                decoder_of(model)(**inputs)
        finally:
            controller.teacher = None
        return teacher.layers
