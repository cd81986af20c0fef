"""Recalled spans: what surrounds an exact match joins the attention window.

For the K best distinct successors of the present context at ``p_1 … p_K`` (semantics section 5) a
query sees, beside its window and sinks, the positions ``p_k - before … p_k + after - 1`` of its own
document, with the keys and values that they had there. No parameter is added: the model's own
attention reads distant content, at exact addresses, as if it stood in the window. A query sees at
most ``W + S + K (before + after)`` keys, however long the context.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rosakit.tuning import attention_forms as forms
from rosakit.tuning.window import AttentionPlan, Positions, visible
from rosakit.types import Match

__all__ = ["Recall", "span_places"]

CHUNK = 1024
"""Queries whose masks over all keys are made at once."""


def span_places(
    match: Match, recall: int, before: int, after: int, own: Tensor, first: Tensor | None
) -> Tensor:
    """The recalled places of every query, ``[B, q, K (before + after)]``; -1 for none.

    Args:
        match: position ``[B, K', q]`` of the successors, best first.
        recall: K, how many of them are recalled.
        before, after: span in front of a successor, and from it on.
        own: ``[B or 1, q]``, the query's own place, in the coordinates of the positions.
        first: ``[B, q]``, the first place of the query's document; None for 0.
    """
    position = match.position[:, :recall].transpose(1, 2).to(own.device, torch.int64)[..., None]
    places = position + torch.arange(-before, after, device=own.device)
    lowest = 0 if first is None else first[..., None, None]
    valid = (position >= 0) & (places >= lowest) & (places <= own[..., None, None])
    return torch.where(valid, places, -1).flatten(2)


class Recall:
    """The recalled spans of one forward pass.

    Args:
        plan: who sees whom without them.
        places: see `span_places`.
        coordinate: gives the place of every key so far, ``[B or 1, keys]``.

    Attributes:
        picked: slots ``[B, n]`` of the keys that a single query sees, which the caches return
            alone; None where they return all keys.
    """

    def __init__(
        self, plan: AttentionPlan, places: Tensor, coordinate: Callable[[], Tensor]
    ) -> None:
        self.plan, self.places, self.coordinate = plan, places, coordinate
        self.picked: Tensor | None = None
        self._real: Tensor | None = None

    def mask(self, start: int, stop: int, window: int, sinks: int, keys: Positions) -> Tensor:
        """Which of the first keys the queries ``start … stop`` see: bool ``[B, 1, n, keys]``."""
        query = Positions(*(x[:, start:stop] for x in self.plan.query))
        places = self.places[:, start:stop]
        count = keys.rank.shape[1]
        coordinate = self.coordinate()[:, :count]
        size = int(coordinate.max()) + 1
        table = torch.zeros((*places.shape[:2], size + 1), dtype=torch.bool, device=places.device)
        inside = (places >= 0) & (places < size)
        table.scatter_(2, torch.where(inside, places, size), True)
        table[..., size] = False
        index = coordinate[:, None].expand(*places.shape[:2], count)
        recalled = table.gather(2, index) & visible(query, keys, None, 0)
        return (recalled | visible(query, keys, window, sinks))[:, None]

    def pick(self, window: int, sinks: int, total: int) -> Tensor | None:
        """Decide which keys a single query sees, out of `total`; sets and returns `picked`."""
        seen = self.mask(0, 1, window, sinks, self.plan.keys(total, False))[:, 0, 0]
        count = int(seen.sum(1).max())
        if count < total:
            # Seen ones first, in order; a row with fewer of them is filled up and masked.
            order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
            self.picked = order
            self._real = seen.gather(1, order)[:, None, None]
        return self.picked

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int,
        sinks: int,
        scores: forms.Scores,
        form: forms.Form,
    ) -> Tensor:
        """Attention within window, sinks and recalled spans.

        Args:
            query: ``[B, H, q, D]``.
            key, value: ``[B, G, k, D]``: all keys so far, or the picked ones.

        Returns:
            ``[B, q, H, D]``.
        """
        if self.picked is not None:
            return forms.dense(module, query, key, value, self._real, scores, form)
        length, total = query.shape[2], key.shape[2]
        where = self.plan.keys(total, False)
        parts: list[Any] = []
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            # Keys stand in order, so the chunk sees none behind its last query.
            last = total - length + stop
            near = Positions(*(x[:, :last] for x in where))
            make = partial(self.mask, start, stop, window, sinks, near)
            mask = self.plan.once(("recall", start, window, sinks, total), make)
            held = (key[:, :, :last], value[:, :, :last])
            parts.append(forms.dense(module, query[:, :, start:stop], *held, mask, scores, form))
        return torch.cat(parts, dim=1)
