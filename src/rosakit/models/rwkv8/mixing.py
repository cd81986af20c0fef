"""RWKV-7's time mixing and RWKV's feed-forward network, as the RWKV-8 demos use them.

Source: RWKV-7 "Goose" (arXiv 2503.14456) and the scripts 251024 and 251105 of BlinkDL/RWKV-LM.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.errors import InvalidInputError
from rosakit.models.rwkv8.recurrence import Wkv7Backend, wkv7
from rosakit.models.rwkv8.rosa_layers import time_shift
from rosakit.models.rwkv8.state import State

NORM_EPS = 64e-5  # of the per-head normalisation, whatever the head size


def _low_rank(channels: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Zero times orthogonal: the product starts at zero and has a gradient."""
    right = torch.zeros(rank, channels)
    nn.init.orthogonal_(right, gain=0.1)
    return nn.Parameter(torch.zeros(channels, rank)), nn.Parameter(right)


class TimeMix(nn.Module):
    """RWKV-7 time mixing.

    Args:
        channels: C.
        head_size: N, divides C.
        rank: ranks of the low-rank maps of decay, learning rate, value residual and gate, in this
            order; one number for all of them.
        layer: index of the layer from 0; layer 0 gives its values to the later ones.
        layers: number of layers, for the initialisation.
    """

    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter

    def __init__(
        self,
        channels: int,
        head_size: int = 16,
        rank: int | tuple[int, int, int, int] = 16,
        layer: int = 0,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if channels % head_size:
            raise InvalidInputError(
                f"{channels} channels do not divide into heads of {head_size}; choose a head "
                "size that divides the channels"
            )
        self.layer, self.head_size, self.heads = layer, head_size, channels // head_size
        self.backend: Wkv7Backend = "auto"
        ranks = (rank,) * 4 if isinstance(rank, int) else rank
        for name, value in self._initial(channels, layer, layers).items():
            setattr(self, name, nn.Parameter(value.view(1, 1, channels)))
        for name, size in zip("wavg", ranks, strict=True):
            left, right = _low_rank(channels, size)
            setattr(self, f"{name}1", left)
            setattr(self, f"{name}2", right)
        self.r_k = nn.Parameter(torch.full((self.heads, head_size), -0.04))
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, channels, bias=False)
        self.ln_x = nn.GroupNorm(self.heads, channels, eps=NORM_EPS)
        bound = 0.5 / math.sqrt(channels)
        nn.init.uniform_(self.receptance.weight, -bound, bound)
        nn.init.uniform_(self.key.weight, -bound / 10, bound / 10)
        nn.init.uniform_(self.value.weight, -bound, bound)
        nn.init.zeros_(self.output.weight)

    def _initial(self, channels: int, layer: int, layers: int) -> dict[str, Tensor]:
        """Initial vectors: shifts, decay, learning rate and so on, graded over the channels."""
        depth = layer / max(layers - 1, 1)
        left = 1.0 - layer / layers
        index = torch.arange(channels, dtype=torch.float32)
        grade = index / max(channels - 1, 1)
        inside = (index % self.head_size) / max((self.head_size - 1) / 2, 0.5) - 1.0
        zigzag = inside * inside.abs()
        shifts = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        vectors = {f"x_{n}": 1.0 - (index / channels) ** (p * left) for n, p in shifts.items()}
        return vectors | {
            "w0": -5.5 + 6.0 * grade ** (1.0 + depth**0.3) + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * (grade - 0.5),
            "v0": 0.73 - 0.4 * (grade - 0.5),
            "k_k": 0.71 - 0.1 * (grade - 0.5),
            "k_a": torch.full((channels,), 1.02),
        }

    def forward(
        self,
        x: Tensor,
        first_value: Tensor | None,
        state: State | None = None,
        name: str = "",
    ) -> tuple[Tensor, Tensor]:
        """One layer of time mixing.

        Args:
            x: ``[B, T, C]``, normalised.
            first_value: ``[B, T, C]``, the values of layer 0; None in layer 0.
            state: the recurrent state, or None for a whole sequence.
            name: prefix of this layer's entries in `state`.

        Returns:
            ``(output [B, T, C], first_value [B, T, C])``.
        """
        batch, length, channels = x.shape
        delta = time_shift(x, state, f"{name}.shift") - x
        shifted = {n: x + delta * getattr(self, f"x_{n}") for n in "rwkvag"}
        r = self.receptance(shifted["r"])
        k = self.key(shifted["k"])
        v = self.value(shifted["v"])
        decay = self.w0 + torch.tanh(shifted["w"] @ self.w1) @ self.w2
        # w = exp(-exp(-softplus(-decay) - 1/2)) = exp(-exp(-1/2) sigmoid(decay))
        log_w = -math.exp(-0.5) * torch.sigmoid(decay)
        if first_value is None:
            first_value = v
        else:
            share = torch.sigmoid(self.v0 + (shifted["v"] @ self.v1) @ self.v2)
            v = v + (first_value - v) * share
        rate = torch.sigmoid(self.a0 + (shifted["a"] @ self.a1) @ self.a2)
        gate = torch.sigmoid(shifted["g"] @ self.g1) @ self.g2

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, self.head_size)

        removal = F.normalize(heads(k * self.k_k), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        first = None if state is None else state.get(f"{name}.wkv")
        y, last = wkv7(
            heads(r),
            heads(log_w),
            heads(k),
            heads(v),
            -removal,
            removal * heads(rate),
            first,
            backend=self.backend,
        )
        if state is not None:
            state.swap(f"{name}.wkv", last.detach())
        y = self.ln_x(y.reshape(batch * length, channels)).view(batch, length, channels)
        bonus = (heads(r) * heads(k) * self.r_k).sum(-1, keepdim=True) * heads(v)
        y = self.output((y + bonus.view(batch, length, channels)) * gate)
        return y, first_value


class FeedForward(nn.Module):
    """RWKV's channel mixing: ``value(relu(key(shifted x)) ** 2)``.

    Args:
        channels: C.
        hidden: width of the middle, 4 C in the published models.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, channels))
        self.key = nn.Linear(channels, hidden, bias=False)
        self.value = nn.Linear(hidden, channels, bias=False)
        nn.init.orthogonal_(self.key.weight, gain=math.sqrt(hidden / channels))
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, state: State | None = None, name: str = "") -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``; with a state, the next T positions."""
        k = x + (time_shift(x, state, f"{name}.shift") - x) * self.x_k
        y: Tensor = self.value(torch.relu(self.key(k)).square())
        return y
