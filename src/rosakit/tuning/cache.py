"""Caches of an attached model: bounded keys and values, and the streaming states.

A windowed layer keeps the sinks, the last ``W`` tokens of each row, and a small reserve for
rollbacks. Which slots those are is the same for all layers, so one
`rosakit.tuning.retention.WindowIndex` per cache decides, once a forward pass, and the
layers follow. One more layer at the end of the cache, `RosaCacheLayer`, carries that
index and rosakit's streaming states through everything that generation does to a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaStates
from rosakit.tuning.retention import Restored, Update, WindowIndex


class SinkWindowLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one windowed layer, ``[B, G, slots, D]``: see `rosakit.tuning.retention`.

    The buffers are written in place, so a decode step costs the same for every window.

    Args:
        index: the index that all windowed layers of the cache share.
    """

    is_sliding = True

    def __init__(self, index: WindowIndex) -> None:
        super().__init__()
        self.index = index
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized: bool = False
        self.cumulative_length = 0

    @property
    def record_past(self) -> bool:
        """Whether nothing is dropped until the next `crop` (assisted generation)."""
        return self.index.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.index.record_past = value

    def activate_past_recording(self) -> None:
        """Keep what `crop` may need again until it is called."""
        self.index.record_past = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, n, D]``; returns all keys and values that this chunk may see.

        What is returned may be a view of the buffer: read it before the next update.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        update = self.index.update
        self.keys, keys = _take_in(self.keys, key_states, update, self.index.visible)
        self.values, values = _take_in(self.values, value_states, update, self.index.visible)
        self.cumulative_length += key_states.shape[2]
        return keys, values

    def get_seq_length(self) -> int:
        """Positions seen, dropped ones included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next chunk sees at most, and the offset of the first."""
        return min(self.cumulative_length, self.index.visible) + query_length, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens can be taken in."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number), as far as the window allows."""
        tokens = self.index.check_crop(tokens_to_remove)
        if not self.is_initialized or self.keys.numel() == 0:
            return
        restored = self.index.cropped(tokens, self.keys.device)
        self.keys = _restore(self.keys, restored)
        self.values = _restore(self.values, restored)
        self.cumulative_length -= tokens


def _take_in(buffer: Tensor, chunk: Tensor, update: Update, visible: int) -> tuple[Tensor, Tensor]:
    """The buffer after a chunk, and the states that the chunk sees."""
    held = buffer.numel() > 0
    shown = chunk
    if update.before and held:
        shown = torch.cat([buffer[:, :, : update.before], chunk], dim=2)
    if update.gather is not None:
        source = chunk if not held else torch.cat([buffer[:, :, : update.width], chunk], dim=2)
        return _gather(source, update.gather), shown
    buffer = _writable(buffer, chunk, update.slots, visible)
    if update.rows is not None:
        place, leaving = (_row_index(x, buffer) for x in update.rows)
        assert place is not None
        if leaving is not None:
            buffer.scatter_(2, leaving, buffer.gather(2, place))
        buffer.scatter_(2, place, chunk)
    for from_chunk, out, into in update.moves:
        buffer[:, :, into] = (chunk if from_chunk else buffer)[:, :, out]
    return buffer, buffer[:, :, : update.shown] if update.before is None else shown


def _restore(buffer: Tensor, restored: Restored) -> Tensor:
    if restored.gather is not None:
        return _gather(buffer, restored.gather)
    if restored.moves:
        buffer = _writable(buffer, buffer, buffer.shape[2], 0)
        for _, out, into in restored.moves:
            buffer[:, :, into] = buffer[:, :, out]
    return buffer


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """Slots ``index [B or 1, slots]`` of ``[B, G, n, D]``."""
    batch, heads, _, width = states.shape
    return states.gather(2, index[:, None, :, None].expand(batch, heads, -1, width))


def _row_index(slot: Tensor | None, buffer: Tensor) -> Tensor | None:
    """Slots ``[B, 1]`` as an index of ``[B, G, 1, D]``."""
    if slot is None:
        return None
    return slot[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])


def _writable(buffer: Tensor, chunk: Tensor, slots: int, visible: int) -> Tensor:
    """The buffer with at least `slots` slots, safe to write to in place."""
    have = buffer.shape[2] if buffer.numel() else 0
    if have < slots:
        # Doubled while it fills up to the window, then allocated whole.
        size = slots if slots >= visible else min(visible, max(slots, 2 * have, 64))
        # Zeros, since a masked slot still takes part in products.
        grown = chunk.new_zeros((chunk.shape[0], chunk.shape[1], size, chunk.shape[3]))
        if have:
            grown[:, :, :have] = buffer
        return grown
    differentiable = torch.is_grad_enabled() and (chunk.requires_grad or buffer.requires_grad)
    frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
    # Autograd holds what earlier chunks saw; inference tensors cannot be changed outside.
    return buffer.clone() if differentiable or frozen else buffer


class GlobalLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer with full attention beside windowed ones."""

    def __init__(self, index: WindowIndex) -> None:
        super().__init__()
        self.index = index

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; refuses, before anything changes, what the windows cannot."""
        self.index.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False


class RecallLayer(GlobalLayer):
    """Keys and values of a windowed layer that recalls spans: all are kept, few are returned.

    Args:
        index: the index that all windowed layers of the cache share; its `picked` says which slots
            the next single query sees.
        offload: keep them in host memory; what is returned goes to the device of the new ones.
    """

    def __init__(self, index: WindowIndex, offload: bool) -> None:
        super().__init__(index)
        self.offload = offload
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized: bool = False
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, n, D]``; returns all keys and values, or those that were picked."""
        device = key_states.device
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        store = torch.device("cpu") if self.offload else device
        keys, values = key_states.to(store), value_states.to(store)
        self.keys, self._key_room = _appended(self.keys, keys, self._key_room)
        self.values, self._value_room = _appended(self.values, values, self._value_room)
        picked = self.index.picked
        if picked is None:
            return self.keys.to(device), self.values.to(device)
        slots = picked.to(store)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return self.keys.gather(2, slots).to(device), self.values.gather(2, slots).to(device)


def _appended(
    held: Tensor | None, new: Tensor, room: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """``[B, G, held + n, D]`` and the buffer that it lies in, a quarter larger than needed.

    A single token is written in place, so that a step does not copy the whole past. What was taken
    apart since (cropped, reordered, loaded) is found to lie elsewhere, or to be shorter.
    """
    if held is None or held.numel() == 0:
        return new, None
    length, total = held.shape[2], held.shape[2] + new.shape[2]
    if new.requires_grad or held.requires_grad:
        return torch.cat([held, new], dim=2), None
    if room is None or room.data_ptr() != held.data_ptr() or room.shape[2] < total:
        room = held.new_empty((*held.shape[:2], total + max(64, total // 4), held.shape[3]))
        room[:, :, :length] = held
    elif room.shape[0] != held.shape[0]:
        return torch.cat([held, new], dim=2), None
    room[:, :, length:total] = new
    return room[:, :, :total], room


class RosaCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The last layer of a prepared cache: index of the window and streaming states.

    Args:
        index: which tokens the windowed layers hold.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, index: WindowIndex) -> None:
        super().__init__()
        self.index = index
        self.states = RosaStates()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: states are made when a module first asks."""

    def update(
        self, key_states: Tensor | None, value_states: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[None, None]:
        """Holds no keys; accepts an empty update, as rebuilding a cache from its tensors does."""
        if key_states is None and value_states is None:
            return None, None
        raise InvalidInputError(
            "the cache has fewer layers than the model: its rosakit layer got keys and values"
        )

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.index.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a full cache would say."""
        return self.index.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: unlimited."""
        return -1

    def offload(self) -> None:
        """States stay where they are."""

    def prefetch(self) -> None:
        """States stay where they are."""

    def reset(self) -> None:
        """Forget everything."""
        self.index.reset()
        self.states.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions (a negative number) from states and index."""
        tokens = self.index.check_crop(tokens_to_remove)
        if self.states.lengths is not None and tokens:
            left = self.index.counts(tokens)
            lengths = self.states.lengths
            self.states.truncate(lengths - tokens if left is None else left.cpu())
        after = self.index.cropped(tokens, torch.device("cpu")).after
        self.index.__dict__.update(after.__dict__)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order (beam search)."""
        self.index.select(beam_idx)
        self.states.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.states.lengths is not None:
            rows = torch.arange(len(self.states.lengths)).repeat_interleave(repeats)
            self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)


def prepare_cache(
    cache: object,
    windowed: Sequence[bool],
    window: int | None,
    sinks: int,
    *,
    recall: bool = False,
    offload: bool = False,
) -> RosaCacheLayer:
    """Turn an empty dynamic cache into one of an attached model, or find what it carries.

    Args:
        cache: `past_key_values` of the forward pass.
        windowed: for every layer of the model whether it is windowed.
        window: W.
        sinks: S.
        recall: windowed layers keep all keys and values, for recalled spans.
        offload: they keep them in host memory.

    Raises:
        InvalidInputError: a static, quantized or offloaded cache, one of another model, or one
            filled before the model was attached.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise InvalidInputError(
            f"past_key_values is a {type(cache).__name__}; an attached model needs a DynamicCache "
            "(or none, to have one made)"
        )
    last = cache.layers[-1] if cache.layers else None
    if isinstance(last, RosaCacheLayer):
        if len(cache.layers) != len(windowed) + 1 or (last.index.window, last.index.sinks) != (
            window,
            sinks,
        ):
            raise InvalidInputError(
                "past_key_values was filled by a model with another number of layers or another "
                "window; start with a fresh cache"
            )
        return last
    if getattr(cache, "offloading", False):
        raise InvalidInputError(
            "offloaded caches are not supported: a window cache is small, use a plain DynamicCache"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise InvalidInputError(
                f"{type(cache).__name__} holds {type(layer).__name__}, which cannot carry a window "
                "and streaming states; static, quantized and other caches are refused. Use a "
                "DynamicCache (leave cache_implementation unset)"
            )
        if layer.get_seq_length() > 0:
            raise InvalidInputError(
                f"past_key_values already holds {layer.get_seq_length()} tokens that rosakit never "
                "saw; start with a fresh cache and run the whole prompt through the attached model"
            )
    index = WindowIndex(window, sinks)
    layers: list[Any] = []
    for number, swap in enumerate(windowed):
        own = cache.layers[number] if number < len(cache.layers) else None
        if swap:
            layers.append(RecallLayer(index, offload) if recall else SinkWindowLayer(index))
        elif isinstance(own, DynamicSlidingWindowLayer):
            layers.append(own)
        else:
            layers.append(GlobalLayer(index))
    carrier = RosaCacheLayer(index)
    # In place: generation loops hold a reference to the cache, not to its list of layers.
    cache.layers[:] = [*layers, carrier]
    return carrier
