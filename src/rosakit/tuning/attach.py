"""`attach` and `detach`: rosakit on a Hugging Face model, and off again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rosakit import symbols
from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.layers import RosaAdapter, RosaContext, TokenRoute
from rosakit.tuning import attention
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.context import Shared
from rosakit.tuning.controller import RosaController
from rosakit.tuning.inject import InjectedAdapter
from rosakit.tuning.modules import (
    AttentionSite,
    attention_sites,
    check_token_route,
    check_windowable,
    decoder_of,
    input_norm,
    select_layers,
)

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


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
    decoder = decoder_of(model)
    sites = attention_sites(decoder)
    if any("rosa" in s.layer._modules or hasattr(s.attention, attention.ATTRIBUTE) for s in sites):
        raise InvalidInputError(
            f"the decoder of this {type(model).__name__} is attached already through another "
            "model object; call rosakit.detach on that one first"
        )
    if decoder.config._attn_implementation == attention.NAME:
        raise InvalidInputError(
            f"this {type(model).__name__} shares its config object with an attached model; build "
            "it from copy.deepcopy(config), or detach the other one first"
        )
    shared = Shared()
    windowed = _windowed(config, decoder, sites)
    head = check_token_route(model) if config.token_route else None
    adapters = _build_adapters(model, config, sites, shared) if config.adapters else {}
    controller = RosaController(
        config,
        windowed,
        _build_token_route(config, decoder, head),
        shared,
        decoder=decoder,
        top=model,
        has_adapters=bool(adapters),
    )

    # Nothing above has touched the model, so a refusal leaves it as it was.
    model.rosa = controller
    # The model's own hooks run last on the way out: they forget the pass.
    model.register_forward_pre_hook(controller.before_model, with_kwargs=True)
    model.register_forward_hook(controller.after_model, always_call=True)
    decoder.register_forward_pre_hook(controller.before_decoder, with_kwargs=True)
    decoder.register_forward_hook(controller.after_decoder, always_call=True)
    if head is not None:
        head.register_forward_hook(controller.after_head)
    for site in sites:
        if site.layer_index in adapters:
            _connect(site, adapters[site.layer_index])
    if config.window is not None:
        _window(decoder, sites, controller, shared)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`: the model is exactly what it was before.

    Returns:
        The same model.

    Raises:
        InvalidInputError: the model is not attached.
    """
    controller = controller_of(model)
    decoder = decoder_of(model)
    sites = attention_sites(decoder)
    own: set[int] = {id(controller)}
    for site in sites:
        sibling = site.layer._modules.pop("rosa", None)
        if sibling is not None:
            own.add(id(sibling))
        if hasattr(site.attention, attention.ATTRIBUTE):
            delattr(site.attention, attention.ATTRIBUTE)
    for module in model.modules():
        _remove_hooks(module, own)
    if controller.original_attention is not None:
        decoder.config._attn_implementation = controller.original_attention
    del model._modules["rosa"]
    return model


def is_attached(model: Any) -> bool:
    """Whether `attach` was called on this model."""
    return isinstance(getattr(model, "_modules", {}).get("rosa"), RosaController)


def controller_of(model: Any) -> RosaController:
    """What `attach` left at ``model.rosa``.

    Raises:
        InvalidInputError: the model is not attached.
    """
    if not is_attached(model):
        raise InvalidInputError(
            f"this {type(model).__name__} is not attached; call rosakit.attach(model, config) first"
        )
    controller: RosaController = model._modules["rosa"]
    return controller


def config_of(model: Any) -> RosaConfig:
    """The configuration that the model was attached with."""
    return controller_of(model).config


def adapters_of(model: Any) -> dict[int, RosaAdapter]:
    """The adapters by layer index."""
    controller_of(model)
    return {
        site.layer_index: site.layer._modules["rosa"].adapter  # type: ignore[union-attr,misc]
        for site in attention_sites(decoder_of(model))
        if "rosa" in site.layer._modules
    }


def rosa_parameters(model: Any) -> dict[str, nn.Parameter]:
    """All parameters that rosakit added, under names that do not depend on the architecture.

    ``layers.<index>.<parameter>`` for adapters and ``token_route.<parameter>``.
    """
    named: dict[str, nn.Parameter] = {}
    for index, adapter in sorted(adapters_of(model).items()):
        named.update({f"layers.{index}.{name}": p for name, p in adapter.named_parameters()})
    route = controller_of(model).token_route
    if route is not None:
        named.update({f"token_route.{name}": p for name, p in route.named_parameters()})
    return named


def freeze_base(model: Any) -> None:
    """Leave only rosakit's own parameters trainable."""
    own = {id(p) for p in rosa_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


@contextmanager
def record_matches(model: Any) -> Iterator[list[RosaContext]]:
    """Collect the context of every forward pass inside the block, with the adapters' matches.

    Yields:
        A list that grows by one `rosakit.layers.RosaContext` a forward pass; its `matches`
        hold the hard match of each layer.
    """
    controller = controller_of(model)
    before, controller.recorder = controller.recorder, []
    try:
        yield controller.recorder
    finally:
        controller.recorder = before


def _windowed(config: RosaConfig, decoder: Any, sites: list[AttentionSite]) -> list[bool]:
    """Which layers rosakit windows: those that see further than W by themselves."""
    if config.window is None:
        return [False] * len(sites)
    check_windowable(decoder, sites)
    unbounded = select_layers("global_layers", config.global_layers, len(sites))
    return [
        site.layer_index not in unbounded
        and (site.native_window is None or site.native_window > config.window)
        for site in sites
    ]


def _build_adapters(
    model: Any, config: RosaConfig, sites: list[AttentionSite], shared: Shared
) -> dict[int, InjectedAdapter]:
    hidden = model.config.get_text_config(decoder=True).hidden_size
    if config.routes is None and hidden % config.bits:
        raise InvalidInputError(
            f"hidden size {hidden} is not divisible by {config.bits} bits; choose bits that divide "
            f"it ({', '.join(str(b) for b in range(1, 17) if hidden % b == 0)}), or set routes"
        )
    symbols.symbol_dtype(config.bits)
    built = {}
    for index in select_layers("layers", config.layers, len(sites)):
        site = sites[index]
        weight = next(site.attention.parameters())
        dtype = weight.dtype if config.adapter_dtype == "auto" else _dtype(config.adapter_dtype)
        adapter = RosaAdapter(
            hidden,
            bits=config.bits,
            routes=config.routes,
            estimator=config.estimator,
            estimator_options=config.estimator_options,
            inject=config.inject,
            unmatched=config.unmatched,
            granularity=config.granularity,
            successor=config.successor,
            max_length=config.max_length,
            min_length=config.min_length,
            own_value=config.own_value,
            retrieve=config.retrieve,
            address=config.address,
            tied_start=config.tied_start,
            layer_index=index,
            device=weight.device,
            dtype=dtype,
        )
        injected = InjectedAdapter(adapter, shared)
        if config.inject == "pre_attn":
            injected.set_norm(input_norm(site))
        built[index] = injected.train(site.layer.training)
    return built


def _build_token_route(
    config: RosaConfig, decoder: Any, head: nn.Module | None
) -> TokenRoute | None:
    if head is None:
        return None
    return TokenRoute(
        decoder.config.hidden_size,
        candidates=config.token_candidates,
        units=config.token_units,
        min_length=config.token_min_length,
        retrieve=config.retrieve,
        device=next(head.parameters()).device,
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _connect(site: AttentionSite, injected: InjectedAdapter) -> None:
    site.layer.rosa = injected
    if injected.adapter.inject == "post_attn":
        site.attention.register_forward_hook(injected.post_attn, with_kwargs=True)
    else:
        input_norm(site).register_forward_hook(injected.norm_input)
        site.attention.register_forward_pre_hook(injected.pre_attn, with_kwargs=True)


def _window(
    decoder: Any,
    sites: list[AttentionSite],
    controller: RosaController,
    shared: Shared,
) -> None:
    config = controller.config
    attention.register()
    for site in sites:
        own = config.window if controller.windowed[site.layer_index] else None
        layer = attention.LayerWindow(own, config.sink_tokens, site.native_window, shared)
        setattr(site.attention, attention.ATTRIBUTE, layer)
    controller.original_attention = decoder.config._attn_implementation
    decoder.config._attn_implementation = attention.NAME


def _remove_hooks(module: nn.Module, owners: set[int]) -> None:
    """Remove the hooks that are bound methods of the given modules."""
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, table)
        for key in [
            k for k, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owners
        ]:
            for name in _HOOK_TABLES:
                getattr(module, name).pop(key, None)
