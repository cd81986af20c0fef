"""How much memory a decoding state takes: of a cache that exists, and of one that is planned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from rosakit import cuda
from rosakit.cuda.stream import bytes_a_symbol
from rosakit.errors import InvalidInputError
from rosakit.layers.device_state import DeviceState, auto_positions
from rosakit.layers.projection import copied_numbers
from rosakit.layers.state import AdapterState
from rosakit.tuning.cache import RosaCacheLayer
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.modules import key_value_bytes, select_layers
from rosakit.tuning.retention import RESERVE

__all__ = ["CacheMemory", "cache_memory", "plan_memory"]

BYTES_A_SYMBOL = 32
"""Bytes of a suffix memory for a symbol of a stream, as measured by ``benchmarks/cpu``."""


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of the parts of a decoding state.

    Attributes:
        context: positions seen, rows together.
        window: keys and values of windowed layers (on the model's device).
        full: keys and values of the other layers (on the model's device).
        states: adapters' streaming states that lie on the model's device.
        suffix: suffix memories of the adapters and of the token route (host memory).
        history: value bits, token ids and selection keys (host memory).
        plain: keys and values of the same context in an ordinary cache, for comparison.
        copies: adapters' weights side by side, as decoding reads them (on the model's device).
    """

    context: int
    window: int
    full: int
    states: int
    suffix: int
    history: int
    plain: int
    copies: int = 0

    @property
    def device(self) -> int:
        """Bytes on the model's device."""
        return self.window + self.full + self.states + self.copies

    @property
    def host(self) -> int:
        """Bytes in host memory (none of them on the device)."""
        return self.suffix + self.history

    @property
    def total(self) -> int:
        """All bytes."""
        return self.device + self.host

    def to_dict(self) -> dict[str, int]:
        """The parts and their sums as plain values."""
        sums = {"device": self.device, "host": self.host, "total": self.total}
        return {**asdict(self), **sums}

    def __str__(self) -> str:
        def share(part: int) -> str:
            of = f" ({part / self.plain:.1%} of an ordinary cache)" if self.plain else ""
            return f"{_shown(part)}{of}"

        return (
            f"{self.context} tokens: on the model's device {share(self.device)}"
            f"{f', {_shown(self.states)} of it suffix state' if self.states else ''}, "
            f"suffix state in host memory {share(self.host)}"
        )


def cache_memory(cache: Any) -> CacheMemory:
    """Bytes that a cache of an attached model holds now.

    Args:
        cache: `past_key_values` of a forward pass or of ``generate``.

    Raises:
        InvalidInputError: not the cache of an attached model.
    """
    layers = getattr(cache, "layers", None) if isinstance(cache, Cache) else None
    carrier = layers[-1] if layers else None
    if not isinstance(carrier, RosaCacheLayer):
        raise InvalidInputError(
            f"this {type(cache).__name__} is not the cache of an attached model; pass the "
            "past_key_values that the model returned"
        )
    assert layers is not None
    window = full = plain = 0
    rows = 1
    for layer in layers[:-1]:
        if not isinstance(layer.keys, Tensor) or layer.keys.numel() == 0:
            continue
        rows = layer.keys.shape[0]
        size = _bytes(layer.keys) + _bytes(layer.values)
        plain += size // layer.keys.shape[2] * carrier.index.length
        if layer.is_sliding:
            window += size
        else:
            full += size
    on_device = suffix = history = 0
    states = carrier.states
    for state in states.adapters.values():
        if isinstance(state, DeviceState):
            on_device += state.nbytes
            continue
        suffix += 0 if state.memory is None else state.memory.nbytes
        history += state.values.nbytes
        if isinstance(state, AdapterState) and state.keys is not None:
            history += state.keys.nbytes
    if states.token is not None:
        suffix += states.token.memory.nbytes
        history += states.token.tokens.nbytes
    if states.far is not None:
        suffix += states.far.memory.nbytes
        history += states.far.tokens.nbytes
    seen = rows * carrier.index.length
    return CacheMemory(seen, window, full, on_device, suffix, history, plain, states.copies.nbytes)


def plan_memory(
    model_config: Any,
    config: RosaConfig,
    context: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    gpu: bool | None = None,
) -> CacheMemory:
    """Bytes that a cache of a model attached so will hold (suffix states: an estimate).

    Args:
        model_config: the model's configuration (`transformers.PreTrainedConfig`).
        config: what is attached.
        context: tokens of each row.
        batch: rows.
        dtype: of keys and values.
        gpu: whether the model runs on a GPU, where states may lie; None for whether there is one.

    Raises:
        InvalidInputError: a context or batch below 1.
    """
    if context < 1 or batch < 1:
        raise InvalidInputError(
            f"context and batch must be at least 1, got context={context}, batch={batch}"
        )
    text = model_config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    token = key_value_bytes(model_config, dtype.itemsize) * batch
    unbounded = select_layers("global_layers", config.global_layers, layers)
    windowed = 0 if config.window is None else layers - len(unbounded)
    visible = config.sink_tokens + (config.window or 0)
    held = context if context <= visible else visible + RESERVE
    adapters, routes = 0, 0
    if config.adapters and config.retrieve:
        adapters = len(select_layers("layers", config.layers, layers))
        routes = config.routes or text.hidden_size // config.bits
    learned = adapters * routes if config.address == "learned" else 0
    reads_tokens = adapters > 0 and config.address == "token"
    tokens = int(config.token_route or reads_tokens)
    tokens += int(reads_tokens and config.far_distance is not None)
    copies = 0
    if learned and config.value_groups == 1:  # narrower values are not joined with q and k
        copies = copied_numbers(text.hidden_size, routes * config.bits, config.projection_rank)
        own = dtype if config.adapter_dtype == "auto" else getattr(torch, config.adapter_dtype)
        copies *= own.itemsize * (1 if config.share_projections else adapters)
    symbols = context * batch
    gpu = cuda.available() if gpu is None else gpu
    held_there = learned and gpu and config.bits <= 8 and config.granularity == "token"
    if held_there and config.backend == "auto":
        ordinary = layers * key_value_bytes(model_config, dtype.itemsize)
        allowed = auto_positions(routes, config.bits, batch, adapters, ordinary)
        held_there = context <= allowed
    elif held_there:
        held_there = config.backend == "cuda"
    # Selection keys are float32, two products wide.
    history = adapters * (routes * (1 if config.bits <= 8 else 2) + 2 * config.select * 4)
    states = 0
    if held_there:
        states, learned, history = round(learned * bytes_a_symbol(config.bits) * symbols), 0, 0
    return CacheMemory(
        symbols,
        window=windowed * token * held,
        full=(layers - windowed) * token * context,
        states=states,
        suffix=(learned + tokens) * BYTES_A_SYMBOL * symbols,
        history=(history + 4 * tokens) * symbols,
        plain=layers * token * context,
        copies=copies,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shown(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 1024:.1f} KiB"
