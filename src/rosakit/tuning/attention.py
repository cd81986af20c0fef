"""The attention function that transformers calls for an attached model.

It is registered with both `AttentionInterface` and `AttentionMaskInterface`. The mask half returns
None: masks follow from the positions of the forward pass (`rosakit.tuning.window`), so no
``[T, T]`` tensor is built for layers that do not need one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.tuning.context import ForwardContext, Shared
from rosakit.tuning.window import block_attention

NAME = "rosakit_window"
"""Name of the attention implementation while a model is attached."""

ATTRIBUTE = "rosa_window"
"""Attribute of an attention module that holds its `LayerWindow`."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")


class LayerWindow:
    """What one attention module is restricted to.

    Attributes:
        window: keys visible to a query, itself included; None for the model's own attention.
        sink_tokens: first tokens visible beyond the window.
        native: the model's own sliding window of this layer, or None.
        shared: where the current forward pass is found when the model passes no keywords down.
    """

    def __init__(
        self, window: int | None, sink_tokens: int, native: int | None, shared: Shared
    ) -> None:
        self.window, self.sink_tokens = window, sink_tokens
        self.native, self.shared = native, shared

    def restriction(self, said: int | None) -> tuple[int | None, int]:
        """Window and sinks of a call: ours, unless the model's own window is no larger.

        Args:
            said: the model's own window as its attention call states it, or None.
        """
        native = self.native if self.native is not None else said
        if self.window is None or (native is not None and native <= self.window):
            return native, 0
        return self.window, self.sink_tokens


def rosakit_window(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the module's window and sinks.

    Args:
        query: ``[B, H, q, D]``.
        key, value: ``[B, G, k, D]``, as the cache returns them.
        attention_mask: None, or an error: positions say who sees whom.

    Returns:
        ``[B, q, H, D]`` and None.
    """
    layer: LayerWindow | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs with attention implementation {NAME!r} but was not "
            "attached. If its model shares its config object with an attached model, build it "
            "from copy.deepcopy(config); otherwise call rosakit.attach on it"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {name!r} in its attention, which windowed attention "
                "does not compute; attach with window=None, or leave this model alone"
            )
    if attention_mask is not None:
        raise InvalidInputError(
            "a ready-made attention mask reached a windowed layer; pass the 2-D attention_mask "
            "(1 for real tokens) to the model and let rosakit derive the rest"
        )
    context: ForwardContext = layer.shared.context_of(module, kwargs)
    plan = context.plan
    assert plan is not None
    context.attended += 1
    window, sinks = layer.restriction(kwargs.get("sliding_window"))
    if plan.wants_blocks(window, sinks):
        assert window is not None
        blocks = plan.blocks(window, sinks)
        return block_attention(query, key, value, blocks, scaling=scaling, dropout=dropout), None
    mask = plan.mask(window, sinks, key.shape[2], held=layer.window is not None)
    if mask is not None and mask.shape[0] != query.shape[0]:
        mask = mask.expand(query.shape[0], -1, -1, -1)
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling
    )[0]
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask half of the registration: see the module's docstring."""


def register() -> None:
    """Make the implementation known to transformers; doing so again changes nothing."""
    AttentionInterface.register(NAME, rosakit_window)
    AttentionMaskInterface.register(NAME, _no_mask)


__all__ = ["ATTRIBUTE", "NAME", "LayerWindow", "register", "rosakit_window"]
