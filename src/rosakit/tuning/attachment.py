"""Building what a configuration adds to a model, and connecting it with hooks.

`rosakit.attach` and the PEFT tuner differ in where they keep the built modules; what those are and
how they take part in a forward pass is decided here, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rosakit import symbols
from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.layers import RosaAdapter, TokenRoute
from rosakit.layers.projection import Projections
from rosakit.ops.value_heads import check_value_groups
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
    key_value_bytes,
    select_layers,
    window_form,
)

__all__ = ["build", "check_free", "connect", "disconnect"]

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def check_free(model: Any) -> None:
    """Refuse a model whose decoder or configuration is connected already.

    Raises:
        InvalidInputError: attached through another model object, or a shared config object.
    """
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


def build(model: Any, config: RosaConfig) -> RosaController:
    """Make adapters, token route and controller; the model is only read.

    Returns:
        The controller, with the adapters in its `injected`.

    Raises:
        UnsupportedModelError: the attention cannot be windowed, or an option does not fit it.
        InvalidInputError: options that do not fit the model's sizes.
    """
    decoder = decoder_of(model)
    sites = attention_sites(decoder)
    shared = Shared()
    windowed = _windowed(config, decoder, sites)
    head = check_token_route(model) if config.token_route else None
    projections = _shared_projections(model, config, sites)
    controller = RosaController(
        config,
        windowed,
        _token_route(config, decoder, head),
        shared,
        decoder=decoder,
        top=model,
        injected=_adapters(model, config, sites, shared, projections) if config.adapters else {},
        projections=projections,
        head=_lens_head(model, config),
    )
    return controller.train(model.training)


def connect(model: Any, controller: RosaController) -> None:
    """Let a built controller and its adapters take part in the model's forward passes."""
    decoder = decoder_of(model)
    # The model's own hooks run last on the way out: they forget the pass.
    model.register_forward_pre_hook(controller.before_model, with_kwargs=True)
    model.register_forward_hook(controller.after_model, always_call=True)
    decoder.register_forward_pre_hook(controller.before_decoder, with_kwargs=True)
    decoder.register_forward_hook(controller.after_decoder, always_call=True)
    if controller.token_route is not None:
        model.get_output_embeddings().register_forward_hook(controller.after_head)
    sites = attention_sites(decoder)
    for site in sites:
        injected = controller.injected.get(site.layer_index)
        if injected is not None:
            _hook(site, injected)
    if controller.config.window is None:
        return
    attention.register()
    form = window_form(decoder, sites)
    for site in sites:
        own = controller.config.window if controller.windowed[site.layer_index] else None
        layer = attention.LayerWindow(
            own, controller.config.sink_tokens, site.native_window, controller.shared, form
        )
        setattr(site.attention, attention.ATTRIBUTE, layer)
    controller.original_attention = decoder.config._attn_implementation
    decoder.config._attn_implementation = attention.NAME


def disconnect(model: Any, controller: RosaController) -> None:
    """Undo `connect`: the model computes what it did before."""
    decoder = decoder_of(model)
    for site in attention_sites(decoder):
        if hasattr(site.attention, attention.ATTRIBUTE):
            delattr(site.attention, attention.ATTRIBUTE)
    own = {id(controller), *(id(injected) for injected in controller.injected.values())}
    for module in model.modules():
        _remove_hooks(module, own)
    if controller.original_attention is not None:
        decoder.config._attn_implementation = controller.original_attention
        controller.original_attention = None


def _windowed(config: RosaConfig, decoder: Any, sites: list[AttentionSite]) -> list[bool]:
    """Which layers rosakit windows: those that see further than W by themselves."""
    if config.window is None:
        return [False] * len(sites)
    check_windowable(decoder, sites)
    window_form(decoder, sites)
    unbounded = select_layers("global_layers", config.global_layers, len(sites))
    return [
        site.layer_index not in unbounded
        and (site.native_window is None or site.native_window > config.window)
        for site in sites
    ]


def _adapters(
    model: Any,
    config: RosaConfig,
    sites: list[AttentionSite],
    shared: Shared,
    projections: Projections | None,
) -> dict[int, InjectedAdapter]:
    hidden = _hidden_size(model, config)
    built = {}
    chosen = select_layers("layers", config.layers, len(sites))
    for index in chosen:
        site = sites[index]
        adapter = RosaAdapter(
            hidden,
            bits=config.bits,
            routes=config.routes,
            estimator=config.estimator,
            estimator_options=config.all_estimator_options,
            inject=config.inject,
            unmatched=config.unmatched,
            granularity=config.granularity,
            successor=config.successor,
            max_length=config.max_length,
            min_length=config.min_length,
            value_groups=config.value_groups,
            own_value=config.own_value,
            retrieve=config.retrieve,
            address=config.address,
            tied_start=config.tied_start,
            shared_qk=config.shared_qk,
            candidates=config.address_candidates + config.far_count,
            far_candidates=config.far_count,
            length_tiers=config.length_tiers,
            select=config.select,
            select_tiers=config.select_tiers,
            select_credit=config.select_credit,
            select_trust=config.select_trust,
            select_lens=config.select_lens,
            hash_orders=config.hash_orders,
            hash_refine=config.hash_refine,
            hash_scale=config.hash_scale,
            hash_seed=config.hash_seed,
            credit_margin=config.credit_margin,
            backend=config.backend,
            layer_index=index,
            rank=config.projection_rank,
            projections=projections,
            **_placement(config, site),
        )
        weight = next(site.attention.parameters())
        adapter.ordinary_bytes = len(sites) * key_value_bytes(model.config, weight.element_size())
        adapter.peers = len(chosen)
        injected = InjectedAdapter(adapter, shared)
        if config.inject == "pre_attn":
            injected.set_norm(input_norm(site))
        built[index] = injected.train(site.layer.training)
    return built


def _shared_projections(
    model: Any, config: RosaConfig, sites: list[AttentionSite]
) -> Projections | None:
    if not (config.adapters and config.share_projections):
        return None
    hidden = _hidden_size(model, config)
    routes = symbols.routes_of(hidden, config.bits) if config.routes is None else config.routes
    check_value_groups(config.value_groups, routes)
    return Projections(
        hidden,
        routes * config.bits,
        config.projection_rank,
        values=routes // config.value_groups * config.bits,
        addresses=config.learns_address,
        own_value=config.own_value,
        tied_start=config.tied_start,
        shared_qk=config.shared_qk,
        silent_addresses=config.address == "hash",
        **_placement(config, sites[0]),
    )


def _lens_head(model: Any, config: RosaConfig) -> Any:
    """The output embedding that lenses read, None without a lens."""
    if not (config.adapters and config.select_lens):
        return None
    head, hidden = model.get_output_embeddings(), _hidden_size(model, config)
    shape = tuple(getattr(getattr(head, "weight", None), "shape", ()))
    if len(shape) != 2 or shape[1] != hidden:
        raise UnsupportedModelError(
            f"select_lens needs an output embedding of width {hidden}; {type(model).__name__} has "
            f"{'one of shape ' + str(list(shape)) if shape else 'none'}; use select_lens=False"
        )
    return head


def _hidden_size(model: Any, config: RosaConfig) -> int:
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    if config.routes is None and hidden % config.bits:
        raise InvalidInputError(
            f"hidden size {hidden} is not divisible by {config.bits} bits; choose bits that divide "
            f"it ({', '.join(str(b) for b in range(1, 17) if hidden % b == 0)}), or set routes"
        )
    symbols.symbol_dtype(config.bits)
    return hidden


def _placement(config: RosaConfig, site: AttentionSite) -> dict[str, Any]:
    """Device and dtype of an adapter beside an attention."""
    weight = next(site.attention.parameters())
    dtype = weight.dtype
    if config.adapter_dtype != "auto":
        dtype = getattr(torch, config.adapter_dtype)
    return {"device": weight.device, "dtype": dtype}


def _token_route(config: RosaConfig, decoder: Any, head: nn.Module | None) -> TokenRoute | None:
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


def _hook(site: AttentionSite, injected: InjectedAdapter) -> None:
    if injected.adapter.inject == "post_attn":
        if injected.adapter.backend == "pipeline":
            site.attention.register_forward_pre_hook(injected.begin, with_kwargs=True)
        site.attention.register_forward_hook(injected.post_attn, with_kwargs=True)
    else:
        input_norm(site).register_forward_hook(injected.norm_input)
        site.attention.register_forward_pre_hook(injected.pre_attn, with_kwargs=True)


def _remove_hooks(module: nn.Module, owners: set[int]) -> None:
    """Remove the hooks that are bound methods of the given modules."""
    for table in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, table)
        for key in [
            k for k, hook in hooks.items() if id(getattr(hook, "__self__", None)) in owners
        ]:
            for name in _HOOK_TABLES:
                getattr(module, name).pop(key, None)
