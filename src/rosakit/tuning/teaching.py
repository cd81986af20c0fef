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
from rosakit.layers.supervision import (
    AddressTargets,
    AttentionTargets,
    address_loss,
    next_token_targets,
    sample_queries,
)
from rosakit.tuning.attach import adapters_of, controller_of
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.output_head import Head, log_probs_of

__all__ = ["AddressTeacher"]


class AddressTeacher:
    """Computes the address loss of a model's learned addresses.

    Args:
        kind: "next_token" or "teacher" (see `rosakit.layers.supervision`), or "surplus": what a
            learned choice reads is worth what the model without adapters lacks (see
            `rosakit.layers.selection.selection_loss`).
        samples: queries a sequence.

    Raises:
        InvalidInputError: an unknown kind.
    """

    def __init__(self, kind: str, samples: int) -> None:
        if kind not in ("next_token", "surplus", "teacher"):
            raise InvalidInputError(
                f"kind must be 'next_token', 'surplus' or 'teacher', got {kind!r}"
            )
        self.kind, self.samples = kind, samples

    def loss(
        self, model: Any, context: RosaContext, inputs: dict[str, Any], *, linear: bool = True
    ) -> Tensor:
        """Mean loss over the layers whose inputs the pass left.

        Args:
            model: an attached model.
            context: of a recorded pass with `keep_inputs`.
            inputs: what the decoder was called with, for a second pass of a kind that needs one.
            linear: whether logits are the output embedding's linear map of the decoder's output.
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
        known = known_log_probs(model, inputs, linear=linear) if self.kind == "surplus" else None
        total = torch.zeros((), device=ids.device)
        for index, adapter in wanted.items():
            if adapter.selection is not None:
                share, found = adapter.selection_shares(context.inputs[index], context)
                total = total + adapter.selection.loss(
                    share,
                    found.position,
                    ids,
                    segment_starts=context.segment_starts,
                    known=known,
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


@torch.no_grad()
def known_log_probs(model: Any, inputs: dict[str, Any], *, linear: bool) -> Tensor:
    """What the windowed model without adapters gives each next token: float32 ``[B, T]``.

    The last position has no next token; what stands there means nothing.

    Args:
        model: an attached model.
        inputs: of its decoder, with `input_ids`.
        linear: whether logits are the output embedding's linear map of the decoder's output.
    """
    follows = torch.roll(inputs["input_ids"], -1, 1)
    controller = controller_of(model)
    controller.silent = True
    try:
        if not linear:
            logits = model(**inputs).logits.float()
            asked: Tensor = logits.log_softmax(-1).gather(-1, follows[..., None])[..., 0]
            return asked
        hidden = decoder_of(model)(**inputs)[0]
    finally:
        controller.silent = False
    embedding = model.get_output_embeddings()
    head = Head(embedding.weight, getattr(embedding, "bias", None))
    return log_probs_of(hidden.flatten(0, 1), follows.reshape(-1, 1), head).view_as(follows)
