"""Credit near the threshold only."""

from __future__ import annotations

import torch
from torch import Tensor


class CreditMargin(torch.autograd.Function):
    """Identity whose gradient reaches only values within `margin` of the threshold 0.

    The credit of a bit says what a flip would do; far from the threshold no small step can flip it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, margin: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x.abs() <= margin)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (near,) = ctx.saved_tensors
        return grad * near, None


def credit_margin(x: Tensor, margin: float | None) -> Tensor:
    """`x` itself; its gradient is zero where ``|x| > margin``. None leaves the gradient alone."""
    if margin is None:
        return x
    limited: Tensor = CreditMargin.apply(x, margin)
    return limited
