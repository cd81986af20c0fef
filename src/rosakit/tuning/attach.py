"""`attach` and `detach`: rosakit on a Hugging Face model, and off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.tuning.attachment import build, check_free, connect, disconnect
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.controller import RosaController
from rosakit.tuning.modules import attention_sites, decoder_of


def attach(model: Any, config: RosaConfig) -> Any:
    """Give a causal language model a window with sinks, adapters and the token route.

    Everything is added beside the model's own modules: ``decoder_layer.rosa`` holds an adapter,
    ``model.rosa`` the token route; hooks connect them. No weight of the model changes and
    `requires_grad` is left alone (see `freeze_base`). With ``token_route=False`` the logits
    start out as those of the windowed model, bit for bit in float32.

    Args:
        model: a transformers model with a causal decoder, for example `LlamaForCausalLM`.
        config: what to add.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: its attention cannot be windowed, or an option does not fit it.
        InvalidInputError: options that do not fit its sizes; already attached.
        InvalidTypeError: not a transformers model, or not a `RosaConfig`.
    """
    if not isinstance(config, RosaConfig):
        raise InvalidTypeError(f"attach needs a RosaConfig, got {type(config).__name__}")
    if is_attached(model):
        raise InvalidInputError(
            f"this {type(model).__name__} is attached already; call rosakit.detach(model) first"
        )
    check_free(model)
    # Building only reads the model, so a refusal leaves it as it was.
    controller = build(model, config)
    model.rosa = controller
    for site in attention_sites(decoder_of(model)):
        if site.layer_index in controller.injected:
            site.layer.rosa = controller.injected[site.layer_index]
    connect(model, controller)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`: the model is exactly what it was before.

    Returns:
        The same model.

    Raises:
        InvalidInputError: the model is not attached.
    """
    controller = controller_of(model)
    if "rosa" not in model._modules:
        raise InvalidInputError(
            f"this {type(model).__name__} is attached through peft; call unload() on the PeftModel"
        )
    disconnect(model, controller)
    for site in attention_sites(decoder_of(model)):
        site.layer._modules.pop("rosa", None)
    del model._modules["rosa"]
    return model


def is_attached(model: Any) -> bool:
    """Whether rosakit takes part in this model's forward passes."""
    return isinstance(getattr(model, "rosa", None), RosaController)


def controller_of(model: Any) -> RosaController:
    """What `attach` left at ``model.rosa``.

    Raises:
        InvalidInputError: the model is not attached.
    """
    if not is_attached(model):
        raise InvalidInputError(
            f"this {type(model).__name__} is not attached; call rosakit.attach(model, config) first"
        )
    controller: RosaController = model.rosa
    return controller


def config_of(model: Any) -> RosaConfig:
    """The configuration that the model was attached with."""
    return controller_of(model).config


def adapters_of(model: Any) -> dict[int, RosaAdapter]:
    """The adapters by layer index."""
    return {i: injected.adapter for i, injected in controller_of(model).injected.items()}


def rosa_parameters(model: Any) -> dict[str, nn.Parameter]:
    """All parameters that rosakit added, under names that do not depend on the architecture.

    ``layers.<index>.<parameter>`` for adapters, ``shared.<parameter>`` for projections that all
    layers share, and ``token_route.<parameter>``.
    """
    named: dict[str, nn.Parameter] = {}
    for index, adapter in sorted(adapters_of(model).items()):
        named.update({f"layers.{index}.{name}": p for name, p in adapter.named_parameters()})
    controller = controller_of(model)
    for part, module in (
        ("shared", controller.projections),
        ("token_route", controller.token_route),
    ):
        if module is not None:
            named.update({f"{part}.{name}": p for name, p in module.named_parameters()})
    return named


def freeze_base(model: Any) -> None:
    """Leave only rosakit's own parameters trainable."""
    own = {id(p) for p in rosa_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


@contextmanager
def record_matches(model: Any, *, keep_inputs: bool = False) -> Iterator[list[RosaContext]]:
    """Collect the context of every forward pass inside the block, with the adapters' matches.

    Args:
        model: an attached model.
        keep_inputs: also keep what learned addresses are computed from, in `inputs`.

    Yields:
        A list that grows by one `rosakit.layers.RosaContext` a forward pass; its `matches`
        hold the hard match of each layer.
    """
    controller = controller_of(model)
    before = controller.recorder, controller.keep_inputs
    controller.recorder, controller.keep_inputs = [], keep_inputs
    try:
        yield controller.recorder
    finally:
        controller.recorder, controller.keep_inputs = before
