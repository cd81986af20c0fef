"""Caches of an attached model: bounded keys and values, and the streaming states.

A windowed layer keeps the sinks and the last ``W - 1`` tokens of each row. Which slots those are
is the same for all layers, so one :class:`WindowIndex` per cache decides, once a forward pass, and
the layers follow. One more layer at the end of the cache, :class:`RosaCacheLayer`, carries that
index and rosakit's streaming states through everything that generation does to a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from rosakit.tuning.window import OUTSIDE, PADDING, Positions


class WindowIndex:
    """Which tokens the windowed layers of a cache hold.

    Slots are ordered by age. `rank` counts a row's real tokens, so padding and gaps leave no
    trace. As long as no padding was seen (`plain`) all rows are alike and slices suffice.

    Args:
        window: W, the current token included; None if no layer is windowed.
        sink_tokens: S.
    """

    def __init__(self, window: int | None, sink_tokens: int) -> None:
        self.window, self.sinks = window, sink_tokens
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.plain = True
        self.held = 0  # slots per row
        self.valid: Tensor | None = None  # [B, length], once padding was seen
        self.rank: Tensor | None = None  # [B, held], -1 for an empty slot
        self.place: Tensor | None = None  # [B, held], index of the slot's token in its row
        self._keep: Tensor | tuple[int, int] | None = None

    @property
    def capacity(self) -> int | None:
        """Slots that decoding needs per row; None without a window."""
        return None if self.window is None else self.sinks + self.window - 1

    def counts(self) -> Tensor | None:
        """Real tokens per row ``[B]``; None while all rows have `length` of them."""
        return None if self.valid is None else self.valid.sum(1)

    def advance(
        self, mask: Tensor | None, chunk: int, device: torch.device
    ) -> tuple[Positions, Positions, Callable[[], Positions]]:
        """Take in a chunk; the layers' updates of this forward pass follow the decision made here.

        Args:
            mask: bool ``[B, chunk]``, real positions; None if all are.
            chunk: number of new positions.

        Returns:
            Positions of the chunk, of the windowed layers' keys, and a call that gives those of
            all keys so far (many tokens, rarely needed).
        """
        if mask is not None and self.plain:
            self._leave_plain(mask.shape[0], device)
        before = self.length
        self.length += chunk
        if self.plain:
            return self._advance_plain(before, chunk, device)
        assert self.valid is not None
        assert self.rank is not None
        assert self.place is not None
        if mask is None:
            mask = self.valid.new_ones((self.valid.shape[0], chunk))
        if mask.shape[0] != self.valid.shape[0]:
            raise InvalidInputError(
                f"the cache holds {self.valid.shape[0]} rows, this chunk has {mask.shape[0]}"
            )
        self.valid = torch.cat([self.valid, mask], dim=1)
        full_rank = torch.where(self.valid, self.valid.cumsum(1) - 1, 0)
        full = Positions(torch.where(self.valid, 0, PADDING), full_rank)
        query = Positions(full.segment[:, before:], full_rank[:, before:])
        held = Positions(torch.where(self.rank >= 0, 0, OUTSIDE), self.rank.clamp(min=0))
        windowed = Positions(*(torch.cat(pair, 1) for pair in zip(held, query, strict=True)))
        rank = torch.cat([self.rank, torch.where(mask, query.rank, -1)], dim=1)
        here = torch.arange(before, self.length, device=device).expand_as(mask)
        self._retain(rank, torch.cat([self.place, here], dim=1), self.valid.sum(1))
        return query, windowed, lambda: full

    def _advance_plain(
        self, before: int, chunk: int, device: torch.device
    ) -> tuple[Positions, Positions, Callable[[], Positions]]:
        def between(*bounds: tuple[int, int]) -> Positions:
            rank = torch.cat([torch.arange(*pair, device=device) for pair in bounds])[None]
            return Positions(torch.zeros_like(rank), rank)

        length = self.length
        sinks, tail = self._plain_parts(self.held, before)
        windowed = between((0, sinks), (before - tail, length))
        self._keep, self.held = self._plain_keep(self.held + chunk, trim=not self.record_past)
        return between((before, length)), windowed, lambda: between((0, length))

    def _plain_parts(self, held: int, length: int) -> tuple[int, int]:
        """Of `held` slots after `length` tokens, how many are the first and how many the last."""
        if held == length:
            return 0, held
        return self.sinks, held - self.sinks

    def _plain_keep(self, total: int, *, trim: bool) -> tuple[tuple[int, int] | None, int]:
        """(first, last) slots to keep of `total`, or None for all; and their number."""
        capacity = self.capacity
        if not trim or capacity is None or total <= capacity:
            return None, total
        return (self.sinks, capacity - self.sinks), capacity

    def _leave_plain(self, batch: int, device: torch.device) -> None:
        """From here on every row has its own slots."""
        sinks, tail = self._plain_parts(self.held, self.length)
        every = torch.arange(self.length, device=device)
        kept = torch.cat([every[:sinks], every[self.length - tail :]])
        self.rank = kept.expand(batch, -1)
        self.place = kept.expand(batch, -1)
        self.valid = torch.ones((batch, self.length), dtype=torch.bool, device=device)
        self.plain = False

    def _retain(self, rank: Tensor, place: Tensor, count: Tensor, *, trim: bool = False) -> None:
        """Choose the slots to keep of ``rank, place [B, n]``; empty slots are the oldest."""
        capacity = self.capacity
        keep = rank >= 0
        if self.window is not None and (trim or not self.record_past):
            keep &= (rank < self.sinks) | (rank > (count - self.window)[:, None])
            number = min(rank.shape[1], self.sinks + self.window - 1)
        else:
            number = rank.shape[1]
        if capacity is None or number == rank.shape[1]:
            self._keep = None
        else:
            order = keep.to(torch.int8).sort(dim=1, stable=True).indices
            self._keep = order[:, rank.shape[1] - number :]
            rank, place = rank.gather(1, self._keep), place.gather(1, self._keep)
            keep = keep.gather(1, self._keep)
        self.rank = torch.where(keep, rank, -1)
        self.place, self.held = place, number

    def retain(self, states: Tensor) -> Tensor:
        """The part of ``[B, G, held + chunk, D]`` that a layer keeps after this chunk."""
        keep = self._keep
        if keep is None:
            return states
        if isinstance(keep, tuple):
            first, last = keep
            total = states.shape[2]
            return torch.cat([states[:, :, :first], states[:, :, total - last :]], dim=2)
        index = keep[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)

    def removed(self, tokens: int) -> Tensor | None:
        """Real tokens per row ``[B]`` left after the last positions are taken away."""
        return None if self.valid is None else self.valid[:, : self.length - tokens].sum(1)

    def check_crop(self, tokens_to_remove: int) -> int:
        """Number of positions to take away.

        Raises:
            InvalidInputError: a positive argument, or tokens that the window needs are gone.
        """
        if tokens_to_remove > 0:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): pass a negative number, the tokens to remove"
            )
        tokens = -tokens_to_remove
        if tokens > self.length:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): the cache holds {self.length} tokens only"
            )
        if tokens == 0 or self.window is None:
            return tokens
        if self.plain:
            _, tail = self._plain_parts(self.held, self.length)
            oldest, left = self.length - tail, self.length - tokens
            lost = oldest > max(left - self.window + 1, min(self.sinks, left))
        else:
            assert self.rank is not None
            assert self.valid is not None
            left_rows = self.valid[:, : self.length - tokens].sum(1)
            count = self.valid.sum(1)
            # Everything from here on is needed; ranks up to the sinks are held apart.
            need = (left_rows - self.window + 1).clamp(min=0)
            need = torch.maximum(need, torch.minimum(left_rows, torch.full_like(need, self.sinks)))
            wanted = (self.rank >= need[:, None]).sum(1)
            lost = bool((wanted < count - need).any())
        if lost:
            raise InvalidInputError(
                f"crop({tokens_to_remove}): the window cache (window {self.window}, sinks "
                f"{self.sinks}) has already dropped tokens that become visible again. Call "
                "cache.activate_past_recording() before the tokens that may be taken back, or "
                "keep a copy.deepcopy of the cache"
            )
        return tokens

    def cropped(self, tokens: int) -> WindowIndex:
        """The index after a crop, whose :meth:`retain` maps the layers' states."""
        after = WindowIndex(self.window, self.sinks)
        after.record_past, after.plain = self.record_past, self.plain
        after.length = self.length - tokens
        if self.plain:
            after._keep, after.held = self._plain_keep(self.held - tokens, trim=True)
            return after
        assert self.valid is not None
        assert self.rank is not None
        assert self.place is not None
        after.valid = self.valid[:, : after.length]
        rank = self.rank.masked_fill(self.place >= after.length, -1)
        after._retain(rank, self.place, after.valid.sum(1), trim=True)
        return after

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        for name in ("valid", "rank", "place"):
            table = getattr(self, name)
            if table is not None:
                setattr(self, name, table[rows.to(table.device)])


class SinkWindowLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one windowed layer: sinks and the last ``W - 1`` tokens.

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

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, n, D]``; returns all keys and values that this chunk may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.keys.numel() == 0
        keys = key_states if first else torch.cat([self.keys, key_states], dim=2)
        values = value_states if first else torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = self.index.retain(keys), self.index.retain(values)
        self.cumulative_length += key_states.shape[2]
        return keys, values

    def get_seq_length(self) -> int:
        """Positions seen, dropped ones included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next chunk sees, and the offset of the first."""
        held = 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[2]
        return held + query_length, 0

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
        after = self.index.cropped(tokens)
        if self.index.plain:
            left = self.keys.shape[2] - tokens
            self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        self.keys, self.values = after.retain(self.keys), after.retain(self.values)
        self.cumulative_length -= tokens


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
            left = self.index.removed(tokens)
            lengths = self.states.lengths
            self.states.truncate(lengths - tokens if left is None else left.cpu())
        after = self.index.cropped(tokens)
        after.record_past = self.index.record_past
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
    cache: object, windowed: Sequence[bool], window: int | None, sinks: int
) -> RosaCacheLayer:
    """Turn an empty dynamic cache into one of an attached model, or find what it carries.

    Args:
        cache: `past_key_values` of the forward pass.
        windowed: for every layer of the model whether it is windowed.
        window: W.
        sinks: S.

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
            layers.append(SinkWindowLayer(index))
        elif isinstance(own, DynamicSlidingWindowLayer):
            layers.append(own)
        else:
            layers.append(GlobalLayer(index))
    carrier = RosaCacheLayer(index)
    # In place: generation loops hold a reference to the cache, not to its list of layers.
    cache.layers[:] = [*layers, carrier]
    return carrier
