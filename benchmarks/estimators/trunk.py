"""The small transformer that every estimator is put into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.layers import RosaAdapter, RosaContext


@dataclass(frozen=True)
class Trunk:
    """Sizes of the model.

    Attributes:
        width: of the hidden state.
        layers: blocks, each with an adapter.
        heads: of the attention.
        window: positions that attention sees, its own included; None for all.
        bits, routes: of every adapter.
        tied_start: key projections start as copies of the query projections.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4
    window: int | None = 16
    bits: int = 8
    routes: int = 32
    tied_start: bool = True


class Block(nn.Module):
    """Windowed attention and retrieval from the same normalised input, then an MLP."""

    def __init__(self, trunk: Trunk, **adapter: Any) -> None:
        super().__init__()
        self.heads, self.window = trunk.heads, trunk.window
        self.qkv = nn.Linear(trunk.width, 3 * trunk.width, bias=False)
        self.out = nn.Linear(trunk.width, trunk.width, bias=False)
        # Attention knows near distances only; further ones share the last entry.
        self.near = nn.Parameter(torch.zeros(trunk.heads, 17))
        self.up = nn.Linear(trunk.width, 2 * trunk.width)
        self.down = nn.Linear(2 * trunk.width, trunk.width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.out.weight)
        self.rosa = RosaAdapter(
            trunk.width,
            bits=trunk.bits,
            routes=trunk.routes,
            tied_start=trunk.tied_start,
            **adapter,
        )

    def forward(self, h: Tensor, context: RosaContext) -> Tensor:
        u = F.rms_norm(h, h.shape[-1:])
        h = h + self._attend(u) + self.rosa(u, context)
        u = F.rms_norm(h, h.shape[-1:])
        y: Tensor = h + self.down(F.gelu(self.up(u)))
        return y

    def _attend(self, u: Tensor) -> Tensor:
        q, k, v = self.qkv(u).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.window is None:
            place = torch.arange(u.shape[1], device=u.device)
            bias = self._bias(place[:, None] - place, u.shape[1])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(u.dtype))
        else:
            y = self._windowed(q, k, v, self.window)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _bias(self, distance: Tensor, window: int) -> Tensor:
        """What is added to the scores, by distance; ``[heads, ...]``."""
        seen = (distance >= 0) & (distance < window)
        return self.near[:, distance.clamp(0, 16)].masked_fill(~seen, -torch.inf)

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Blocks as long as the window, each seeing itself and the block before."""
        length = q.shape[2]
        q, k, v = (F.pad(x, (0, 0, 0, -length % window)) for x in (q, k, v))
        q, k, v = (x.unflatten(2, (-1, window)) for x in (q, k, v))
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, -1)), x], 3) for x in (k, v))
        place = torch.arange(window, device=q.device)
        around = torch.arange(-window, window, device=q.device)
        bias = self._bias(place[:, None] - around, window)[:, None].to(q.dtype)
        first = torch.zeros(q.shape[2], 1, 2 * window, dtype=torch.bool, device=q.device)
        first[0, :, :window] = True  # nothing lies before the first block
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + bias
        weights = scores.masked_fill(first, -torch.inf).softmax(-1)
        return (weights @ v).flatten(2, 3)[:, :, :length]


class Model(nn.Module):
    """Embedding, blocks, and a head on the asked positions."""

    def __init__(self, vocabulary: int, trunk: Trunk, **adapter: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, trunk.width)
        self.blocks = nn.ModuleList(Block(trunk, **adapter) for _ in range(trunk.layers))
        self.head = nn.Linear(trunk.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits ``[B * N, V]`` of `tokens` ``[B, T]`` at positions `asked`, int64 ``[B, N]``."""
        h, context = self.embed(tokens), RosaContext()
        for block in self.blocks:
            h = block(h, context)
        h = h.gather(1, asked[..., None].expand(-1, -1, h.shape[-1])).flatten(0, 1)
        logits: Tensor = self.head(F.rms_norm(h, h.shape[-1:]))
        return logits

    def adapters(self) -> list[RosaAdapter]:
        """The adapters, first layer first."""
        return [block.rosa for block in self.blocks]  # type: ignore[union-attr, misc]
