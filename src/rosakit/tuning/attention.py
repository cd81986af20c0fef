"""The attention function that transformers calls for an attached model.

It is registered with both `AttentionInterface` and `AttentionMaskInterface`. The mask half returns
None: masks follow from the positions of the forward pass (`rosakit.tuning.window`), so no
``[T, T]`` tensor is built for layers that do not need one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.tuning import attention_forms as forms
from rosakit.tuning.context import ForwardContext, Shared
from rosakit.tuning.window import block_attention

NAME = "rosakit_window"
"""Name of the attention implementation while a model is attached."""

ATTRIBUTE = "rosa_window"
"""Attribute of an attention module that holds its `LayerWindow`."""

_UNSUPPORTED = ("position_bias", "head_mask", "cache")


class LayerWindow:
    """What one attention module is restricted to.

    Attributes:
        window: keys visible to a query, itself included; None for the model's own attention.
        sink_tokens: first tokens visible beyond the window.
        native: the model's own sliding window of this layer, or None.
        shared: where the current forward pass is found when the model passes no keywords down.
        form: how attention is computed, see `rosakit.tuning.attention_forms`.
    """

    def __init__(
        self,
        window: int | None,
        sink_tokens: int,
        native: int | None,
        shared: Shared,
        form: forms.Form = "sdpa",
    ) -> None:
        self.window, self.sink_tokens = window, sink_tokens
        self.native, self.shared, self.form = native, shared, form

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
    if context.teacher is not None:
        # The model as it was before it was windowed.
        window, sinks = layer.native or kwargs.get("sliding_window"), 0
        context.teacher.see(int(getattr(module, "layer_idx", -1)), query, key, scaling)
    scores = forms.Scores(scaling, kwargs.get("softcap"), kwargs.get("s_aux"), dropout)
    held, keys = layer.window is not None, key.shape[2]
    if context.recall is not None and held and context.teacher is None and window == layer.window:
        assert window is not None
        recall = context.recall
        return recall.attend(module, query, key, value, window, sinks, scores, layer.form), None
    if layer.form == "flex" and query.shape[2] >= forms.FLEX_QUERIES:
        mask = plan.once(
            ("flex", window, sinks, keys, held),
            lambda: forms.block_mask(plan.query, plan.keys(keys, held), window, sinks),
        )
        return forms.flexible(query, key, value, mask, scores), None
    if plan.wants_blocks(window, sinks):
        assert window is not None
        blocks = plan.blocks(window, sinks)
        plain = layer.form != "eager" and scores.plain

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            if not plain:
                return forms.eager(q, k, v, mask, scores)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling
            )

        return block_attention(query, key, value, blocks, attend), None
    mask = plan.mask(window, sinks, keys, held=held)
    return forms.dense(module, query, key, value, mask, scores, layer.form), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask half of the registration: see the module's docstring."""


def register() -> None:
    """Make the implementation known to transformers; doing so again changes nothing."""
    AttentionInterface.register(NAME, rosakit_window)
    AttentionMaskInterface.register(NAME, _no_mask)


__all__ = ["ATTRIBUTE", "NAME", "LayerWindow", "register", "rosakit_window"]
