"""Finding the parts of a Hugging Face decoder without naming architectures."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from rosakit.errors import InvalidInputError, InvalidTypeError, UnsupportedModelError
from rosakit.tuning.attention_forms import Form, form_of

_INPUT_NORMS = ("input_layernorm", "ln_1", "self_attn_layer_norm", "attention_norm", "norm1")


class AttentionSite(NamedTuple):
    """One attention of the decoder.

    Attributes:
        layer_index: its layer, which is also its place in the cache.
        name: its qualified name in the decoder.
        attention: the module.
        layer: the decoder layer that holds it.
        native_window: the model's own sliding window there, as far as the module or its layer
            type tell; None otherwise (some models only say it in each attention call).
    """

    layer_index: int
    name: str
    attention: nn.Module
    layer: nn.Module
    native_window: int | None


def decoder_of(model: Any) -> Any:
    """The decoder stack of a causal language model.

    Raises:
        InvalidTypeError: not a transformers model.
        UnsupportedModelError: a model without a causal decoder.
    """
    # Wrappers forward attributes, but generation calls the model inside them, past our hooks.
    if not isinstance(model, PreTrainedModel):
        raise InvalidTypeError(
            f"attach needs a transformers model (PreTrainedModel), got {type(model).__name__}; "
            "unwrap peft (get_base_model()), DDP or compiled models first"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; rosakit attaches to causal decoders"
        )
    decoder = model.get_decoder()
    return model if decoder is None else decoder


def attention_sites(decoder: Any) -> list[AttentionSite]:
    """The decoder's attentions in layer order.

    Raises:
        UnsupportedModelError: their class is not declared, or layers and attentions differ in
            number.
    """
    recorded = getattr(decoder, "_can_record_outputs", None) or {}
    kinds, part = _classes(recorded.get("attentions"))
    if not kinds:
        kinds = _named_attentions(decoder)
    if not kinds:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} declares no attention modules "
            "(_can_record_outputs['attentions']) and has none in its layers that is called so; "
            "rosakit needs one attention a layer"
        )
    modules: dict[str, nn.Module] = dict(decoder.named_modules())
    sites: list[AttentionSite] = []
    for name, module in modules.items():
        if not isinstance(module, kinds) or (part is not None and part not in f".{name}"):
            continue
        layer = modules[name.rpartition(".")[0]]
        index = getattr(module, "layer_idx", None)
        index = len(sites) if index is None else int(index)
        sites.append(AttentionSite(index, name, module, layer, _native_window(module, index)))
    sites.sort(key=lambda site: site.layer_index)
    expected = decoder.config.num_hidden_layers
    if [site.layer_index for site in sites] != list(range(expected)):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {len(sites)} attention modules for {expected} layers; "
            "models with attention in some layers only, or several per layer, are not supported"
        )
    return sites


def _classes(declared: Any) -> tuple[tuple[type, ...], str | None]:
    """Classes out of what `_can_record_outputs` may hold, and a part of the name, if any."""
    if isinstance(declared, type):
        return (declared,), None
    if isinstance(declared, list | tuple):
        found = [_classes(item) for item in declared]
        return tuple(kind for kinds, _ in found for kind in kinds), None
    target = getattr(declared, "target_class", None)
    return ((target,), getattr(declared, "layer_name", None)) if target is not None else ((), None)


def _named_attentions(decoder: Any) -> tuple[type, ...]:
    """Classes called attention among the children of the decoder's layers."""
    return tuple(
        {
            type(child)
            for stack in decoder.children()
            if isinstance(stack, nn.ModuleList) and len(stack) == decoder.config.num_hidden_layers
            for layer in stack
            for child in layer.children()
            if type(child).__name__.endswith("Attention")
        }
    )


def _native_window(attention: nn.Module, index: int) -> int | None:
    config: Any = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None)
    own = getattr(attention, "sliding_window", None)
    if kinds is not None:
        if "sliding" not in kinds[index]:
            return None
        own = own if own is not None else getattr(config, "sliding_window", None)
    return None if own is None else int(own)


def check_windowable(decoder: Any, sites: list[AttentionSite]) -> None:
    """Raise UnsupportedModelError, with the reason, if the attention cannot be windowed."""
    name = type(decoder).__name__

    def refuse(reason: str) -> None:
        raise UnsupportedModelError(
            f"the attention of {name} cannot be windowed: {reason}. Use window=None to attach "
            "adapters or a token route without a window"
        )

    if not (
        getattr(decoder, "_supports_attention_backend", False)
        or decoder._can_set_attn_implementation()
    ):
        refuse("it does not go through transformers' AttentionInterface")
    config = decoder.config
    # Without a scaled-dot-product form a model does something to its scores; two things are known.
    known = getattr(config, "attn_logit_softcapping", None) is not None or has_sink_logits(sites)
    if not getattr(decoder, "_supports_sdpa", False) and not known:
        refuse("it has no scaled-dot-product form")
    if any("chunked" in kind for kind in getattr(config, "layer_types", None) or ()):
        refuse("it attends in chunks")
    if getattr(config, "alibi", False):
        refuse("it adds ALiBi position biases")
    for site in sites:
        if not getattr(site.attention, "is_causal", True):
            refuse(f"{site.name} is not causal")


def has_sink_logits(sites: list[AttentionSite]) -> bool:
    """Whether the attentions have learned sink logits (gpt-oss)."""
    return any(isinstance(getattr(site.attention, "sinks", None), nn.Parameter) for site in sites)


def window_form(decoder: Any, sites: list[AttentionSite]) -> Form:
    """The form of windowed attention for the implementation that the model was loaded with.

    Raises:
        UnsupportedModelError: an implementation that cannot compute a window with sinks.
    """
    return form_of(
        decoder.config._attn_implementation,
        sinks=has_sink_logits(sites),
        name=type(decoder).__name__,
    )


def check_token_route(model: Any) -> nn.Module:
    """The output embedding that the token route hooks.

    Raises:
        UnsupportedModelError: the model has none, or changes the logits after it.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"token_route needs an output embedding, but {type(model).__name__} has none; load the "
            "model with AutoModelForCausalLM"
        )
    config = model.config.get_text_config(decoder=True)
    for name, neutral in (
        ("final_logit_softcapping", None),
        ("logit_scale", 1.0),
        ("logits_scaling", 1.0),
    ):
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise UnsupportedModelError(
                f"token_route mixes log probabilities right after the output embedding, but "
                f"{type(model).__name__} changes logits later ({name}={value}); use "
                "token_route=False"
            )
    return head


def input_norm(site: AttentionSite) -> nn.Module:
    """The norm in front of an attention, for ``inject="pre_attn"``.

    Raises:
        UnsupportedModelError: the layer has none that we know.
    """
    for name in _INPUT_NORMS:
        found = getattr(site.layer, name, None)
        if isinstance(found, nn.Module):
            return found
    children = ", ".join(name for name, _ in site.layer.named_children())
    raise UnsupportedModelError(
        f"inject='pre_attn' mixes in front of the norm of the attention's input, but "
        f"{type(site.layer).__name__} has none of {', '.join(_INPUT_NORMS)} (it has {children}); "
        "use inject='post_attn'"
    )


def select_layers(name: str, wanted: tuple[int, ...] | None, count: int) -> list[int]:
    """Layer indices, negative ones counted from the end.

    Raises:
        InvalidInputError: an index outside the model, or one named twice.
    """
    if wanted is None:
        return list(range(count))
    outside = [index for index in wanted if not -count <= index < count]
    if outside:
        raise InvalidInputError(
            f"RosaConfig.{name} names layers {outside}, but the model has {count} "
            f"(0..{count - 1}, or -{count}..-1)"
        )
    chosen = sorted(index % count for index in wanted)
    if len(set(chosen)) != len(chosen):
        raise InvalidInputError(f"RosaConfig.{name} names a layer twice: {list(wanted)}")
    return chosen


def argument_names(function: Any) -> list[str]:
    """Names of positional parameters, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def takes_keywords(function: Any) -> bool:
    """Whether a function accepts keyword arguments that it does not name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def key_value_bytes(model_config: Any, itemsize: int) -> int:
    """Bytes of keys and values that one layer of an ordinary cache holds for a position.

    Args:
        model_config: the model's configuration (`transformers.PreTrainedConfig`).
        itemsize: bytes of a number.
    """
    text = model_config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * groups * width * itemsize)
