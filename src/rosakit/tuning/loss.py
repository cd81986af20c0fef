"""The training loss of an attached model, without a ``[T, V]`` tensor in memory.

Cross entropy and token route need the language model's log probability at the label and at the K
candidates only, so the vocabulary is visited in chunks of positions that are recomputed in the
backward pass. Where nothing below the output embedding is trained (the token route alone), no
graph is built below it at all, and the backward pass touches a few hundred numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.layers import RosaContext, TokenCandidates, TokenRoute
from rosakit.layers.graphs import outside_graphs
from rosakit.layers.health import Fault, FaultLog
from rosakit.layers.token_route import mixed_log_prob
from rosakit.tuning.attach import adapters_of, config_of, controller_of, is_attached
from rosakit.tuning.health import layer_health, mean_health, token_route_health
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.output_head import Head, find_head, log_probs_of
from rosakit.tuning.packing import IGNORE
from rosakit.tuning.teaching import AddressTeacher

_OBSERVED_LAYERS = 4
"""Layers whose retrieval an observed step looks at."""

__all__ = ["Head", "LossModel", "candidate_nll", "find_head", "log_probs_of"]


def candidate_nll(
    route: TokenRoute, hidden: Tensor, log_p: Tensor, target: Tensor, found: TokenCandidates
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood under the token route's mixture.

    Args:
        route: the token route.
        hidden: ``[N, H]``.
        log_p: ``[N, 1 + K]``, the model's log probabilities of the target and the candidates.
        target: ``[N]``.
        found: candidates ``[N, K]``.

    Returns:
        The loss ``[N]`` and ``log g_keep [N]``.
    """
    log_keep, log_copy = route.gate(hidden, log_p[:, 1:], found)
    mixed = mixed_log_prob(target[:, None], log_p[:, :1], log_keep, log_copy, found)
    return -mixed[:, 0], log_keep


class LossModel(nn.Module):
    """The model and its loss as one module, so that wrappers for parallel training see one call.

    Args:
        model: the language model, attached or not.
        head: its output embedding, or None to go through the model's own forward pass.
        teacher: adds a loss of the addresses in training passes; None for none.
        teacher_weight: its weight.

    Attributes:
        observe: compute `health` in the next forward passes.
        health: health metrics of the last observed forward pass.
    """

    def __init__(
        self,
        model: Any,
        head: Head | None,
        *,
        teacher: AddressTeacher | None = None,
        teacher_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = model
        self.has_head = head is not None
        # Which modules FSDP shards as one: the decoder's layers, with the adapters inside.
        self._no_split_modules = list(getattr(model, "_no_split_modules", None) or [])
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.observe = False
        self._faults = FaultLog()
        self.health: dict[str, float] = {}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        num_items: Tensor | int | None = None,
        packed: bool | None = None,
    ) -> dict[str, Tensor]:
        """Mean negative log likelihood in nats a token.

        Args:
            input_ids, labels: ``[B, T]``; labels of -100 do not count.
            position_ids: ``[B, T]``, restarting with each document.
            num_items: what to divide the sum by; None for the number of labels that count.
            packed: whether `position_ids` restart inside a row, as `collate` says on the CPU; None
                to find out, which waits for the device and breaks the graph of a compiled model.

        Returns:
            `loss`, and the number of `tokens` that count.
        """
        with _told(self.model, packed):
            passes = self._observed if self.observe else self._loss
            return passes(input_ids, labels, position_ids, num_items)

    def _loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        num_items: Tensor | int | None,
    ) -> dict[str, Tensor]:
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        counted = target != IGNORE
        teaching = self.teacher is not None and torch.is_grad_enabled()
        watch = _Watch(self.model, self.observe, keep_inputs=teaching or self.observe)
        with watch:
            nll, found, log_keep = self._nll(input_ids, position_ids, target, counted, watch)
        tokens = counted.sum()
        if self.observe:
            health, faults = watch.health()
            health |= self._faults.take(faults)
            if found is not None and log_keep is not None:
                wide = TokenCandidates(*(x[None] for x in found))
                health |= token_route_health(
                    wide,
                    log_keep[None],
                    target[counted][None],
                    window=config_of(self.model).window,
                )
            self.health = health
        count = tokens.clamp(min=1) if num_items is None else num_items
        loss = nll.sum() / count
        if teaching and watch.context is not None and watch.context.inputs:
            assert self.teacher is not None
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
            taught = self.teacher.loss(self.model, watch.context, inputs, linear=self.has_head)
            if self.observe:
                self.health["address_loss"] = float(taught.detach())
            # Weighed by this pass's share of the step, like the loss itself.
            loss = loss + self.teacher_weight * taught * (tokens / count)
        return {"loss": loss, "tokens": tokens}

    _observed = outside_graphs(_loss)
    """The same where health is looked at: rare, full of numbers that the host reads, and of other
    branches, which compiled would use up the recompilations of the others."""

    def _nll(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        target: Tensor,
        counted: Tensor,
        watch: _Watch,
    ) -> tuple[Tensor, TokenCandidates | None, Tensor | None]:
        """Loss ``[N]`` of the positions that count, their candidates and ``log g_keep``."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        wanted = target[counted]
        if not self.has_head:
            logits = self.model(**inputs).logits[counted]
            return F.cross_entropy(logits.float(), wanted, reduction="none"), None, None
        hidden = decoder_of(self.model)(**inputs)[0][counted]
        # Looked up in each pass: sharding and moving replace parameters.
        embedding = self.model.get_output_embeddings()
        head = Head(embedding.weight, getattr(embedding, "bias", None))
        context = watch.context
        if context is None or context.candidates is None:
            return -log_probs_of(hidden, wanted[:, None], head)[:, 0], None, None
        found = TokenCandidates(*(x[counted] for x in context.candidates))
        ids = torch.cat([wanted[:, None], found.token], dim=1)
        log_p = log_probs_of(hidden, ids, head)
        route = controller_of(self.model).token_route
        assert route is not None
        nll, log_keep = candidate_nll(route, hidden, log_p, wanted, found)
        return nll, found, log_keep


@contextmanager
def _told(model: Any, packed: bool | None) -> Iterator[None]:
    """Let all passes inside, the teacher's too, know whether the batch is packed."""
    if not is_attached(model):
        yield
        return
    controller = controller_of(model)
    before, controller.packed = controller.packed, packed
    try:
        yield
    finally:
        controller.packed = before


class _Watch:
    """Records what one forward pass matched, with which addresses, and what is wrong with it."""

    def __init__(self, model: Any, observe: bool, *, keep_inputs: bool) -> None:
        self.controller = controller_of(model) if is_attached(model) else None
        self.model, self.observe = model, observe and self.controller is not None
        self.keep_inputs = keep_inputs
        self._records: list[RosaContext] = []

    @property
    def context(self) -> RosaContext | None:
        return self._records[-1] if self._records else None

    def __enter__(self) -> None:
        if self.controller is None:
            return
        controller = self.controller
        self._before = controller.recorder, controller.keep_inputs, controller.record_layers
        controller.recorder, controller.keep_inputs = self._records, self.keep_inputs
        # A layer's matches are as large as many layers' activations, so few of them are kept.
        seen = _spread(sorted(controller.injected), _OBSERVED_LAYERS) if self.observe else ()
        controller.record_layers = frozenset(seen)

    def __exit__(self, *error: object) -> None:
        controller = self.controller
        if controller is not None:
            controller.recorder, controller.keep_inputs, controller.record_layers = self._before

    def health(self) -> tuple[dict[str, float], dict[str, list[Fault]]]:
        """Metrics of the recorded pass, averaged over its layers, and the faults of each."""
        if self.context is None:
            return {}, {}
        window, adapters = config_of(self.model).window, adapters_of(self.model)
        layers, faults = [], {}
        for index in self.context.matches:
            adapter = adapters[index]
            whole = not _sharded(adapter.e0, adapter.channels)
            values, found = layer_health(adapter, self.context, window=window, whole=whole)
            layers.append(values)
            faults[f"layer {index}"] = found
        return mean_health(layers), faults


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` items, evenly spread and with the last one."""
    if len(items) <= count:
        return list(items)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def _sharded(parameter: Tensor, size: int) -> bool:
    """Whether this process holds a part of the parameter only (FSDP, ZeRO-3)."""
    return type(parameter.data) is not Tensor or parameter.numel() != size
