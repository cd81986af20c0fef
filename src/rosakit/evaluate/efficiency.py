"""What a context costs: time to read it, time for one more token, memory held."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from rosakit.errors import InvalidInputError
from rosakit.evaluate.results import Efficiency
from rosakit.evaluate.scores import Progress, device_of, evaluating

__all__ = ["cache_bytes", "efficiency"]


def efficiency(
    model: Any,
    lengths: Sequence[int],
    *,
    steps: int = 16,
    repeats: int = 3,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Efficiency, ...]:
    """Prefill and decode time and memory of one model at several context lengths, batch size 1.

    Args:
        model: a causal language model with a cache, attached or not.
        lengths: tokens of context.
        steps: tokens decoded at each length; the first is not timed.
        repeats: prefills at each length, of which the median counts; one more warms up.
        ids: tokens to read, repeated as needed; None for random ones.
        seed: of random tokens.
        progress: called after each length.

    Raises:
        InvalidInputError: sizes out of range.
    """
    if not lengths or min(lengths) < 1 or steps < 2 or repeats < 1:
        raise InvalidInputError(
            f"efficiency needs lengths >= 1, steps >= 2 and repeats >= 1; got {list(lengths)}, "
            f"{steps} and {repeats}"
        )
    device = device_of(model)
    total = max(lengths) + steps
    if ids is None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        row = torch.randint(vocabulary, (total,), generator=generator)
    else:
        row = torch.tensor(list(ids)).repeat(-(-total // len(ids)))[:total]
    row = row.to(device)[None]
    found = []
    for done, length in enumerate(lengths, start=1):
        found.append(_measure(model, row, length, steps, repeats, device))
        if progress is not None:
            progress("efficiency", done, len(lengths))
    return tuple(found)


def _measure(
    model: Any, row: torch.Tensor, length: int, steps: int, repeats: int, device: torch.device
) -> Efficiency:
    gpu = device.type == "cuda"

    def now() -> float:
        if gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    prefills, decodes = [], []
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with evaluating(model):
        for repeat in range(repeats + 1):
            begin = now()
            cache = model(
                input_ids=row[:, :length], use_cache=True, logits_to_keep=1
            ).past_key_values
            if repeat:
                prefills.append(now() - begin)
        held = cache_bytes(cache)
        for step in range(steps):
            token = row[:, length + step : length + step + 1]
            begin = now()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            if step:
                decodes.append(now() - begin)
    return Efficiency(
        length,
        statistics.median(prefills),
        1000 * statistics.median(decodes),
        held,
        torch.cuda.max_memory_allocated(device) if gpu else None,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values, streaming states and copied weights in a cache.

    Views that share one buffer count once, and the buffer counts as a whole.
    """
    total, seen = 0, set()
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
        states = getattr(layer, "states", None)
        total += 0 if states is None else states.nbytes + states.copies.nbytes
    return total
