"""Llama's root-mean-square norms in one kernel instead of six; the same up to rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["fuse_norms"]


def fuse_norms(model: Any) -> int:
    """Let every `LlamaRMSNorm` of the model run fused; returns how many there are.

    Norms of other classes stay as they are: some add one to the weight, or norm in another type.
    """
    found = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for module in found:
        module.forward = _fused(module)
    return len(found)


def _fused(module: nn.Module) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        epsilon: Any = module.variance_epsilon
        return F.rms_norm(x, weight.shape, weight, epsilon)

    return forward
