"""LoRA for experiments: weights and update are added before the product, in one matrix a layer.

Mathematically what peft computes; on a GPU several times faster at this size, since nothing of the
size of the activations is added. The update stays in float32, and so does its sum with the weights;
products run in the model's type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SummedLora", "add_summed_lora", "remove_summed_lora"]


class SummedLora(nn.Module):
    """``x (W + 2 B A)^T`` with a frozen W; starts as ``x W^T``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        out, into = linear.weight.shape
        options: Any = {"device": linear.weight.device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.randn(rank, into, **options) / math.sqrt(into))
        self.up = nn.Parameter(torch.zeros(out, rank, **options))
        self.frozen = linear.weight.detach().float()  # no buffer: nobody saves or moves it

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.addmm(self.frozen, self.up, self.down, alpha=2)
        return F.linear(x, weight.to(x.dtype), self.linear.bias)


def add_summed_lora(model: Any, rank: int) -> list[nn.Parameter]:
    """Wrap all linear layers of the decoder; returns what can be trained."""
    added: list[nn.Parameter] = []
    decoder = model.get_decoder()
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                wrapped = SummedLora(child, rank)
                setattr(module, name, wrapped)
                added += [wrapped.down, wrapped.up]
    return added


def remove_summed_lora(model: Any) -> None:
    """Take all wrappers off again; the linear layers are what they were."""
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SummedLora):
                setattr(module, name, child.linear)
