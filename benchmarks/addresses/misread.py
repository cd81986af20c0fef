"""Controls that keep an address's pattern and lose its content.

What is read tells the output projection two things: a value, and that something was found and how
far it is trusted (which routes read nothing). These controls keep the second and replace the first.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rosakit.layers import RosaAdapter


def misread(adapter: RosaAdapter, what: Literal["own", "random"]) -> None:
    """Let an adapter with exact matches read something else wherever it reads a match.

    Args:
        adapter: changed in place; its choice, its nulls and its gradients to the choice stay.
        what: "own", each position's own value, or "random", one earlier position's, drawn anew in
            every pass and alike for all routes.
    """
    plain = adapter.read_at

    def read_at(v: Tensor, position: Tensor, e0: Tensor, e1: Tensor) -> Tensor:
        return plain(v, elsewhere(position, what), e0, e1)

    # An instance's own method; `nn.Module` keeps plain functions as attributes.
    adapter.read_at = read_at  # type: ignore[method-assign]


def elsewhere(position: Tensor, what: Literal["own", "random"]) -> Tensor:
    """``position [B, R, T]`` with other places wherever there is one; negative ones stay."""
    batch, _, length = position.shape
    own = torch.arange(length, device=position.device, dtype=torch.float32)
    if what == "random":
        own = (torch.rand(batch, 1, length, device=position.device) * own).floor()
    return torch.where(position < 0, position, own.to(position.dtype))
