"""Log probabilities of chosen tokens, without a ``[T, V]`` tensor in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rosakit.tuning.modules import decoder_of

__all__ = ["Head", "find_head", "log_probs_of"]


class Head(NamedTuple):
    """An output embedding that is nothing but a linear map: weight ``[V, H]``, bias ``[V]``."""

    weight: Tensor
    bias: Tensor | None


def find_head(model: Any) -> Head | None:
    """The model's output embedding, if its logits are exactly that linear map of its decoder.

    Models that scale or cap their logits get None and are trained through their own forward pass.
    The model must not be attached yet.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    found = Head(weight, getattr(head, "bias", None))
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = decoder_of(model)(input_ids=ids, use_cache=False)[0]
        if hidden.shape[-1] != weight.shape[1]:
            return None
        logits = F.linear(hidden, *found)
    same = torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-3)
    return found if same else None


def log_probs_of(hidden: Tensor, ids: Tensor, head: Head, *, chunk: int | None = None) -> Tensor:
    """Log probabilities of chosen tokens.

    Args:
        hidden: ``[N, H]``.
        ids: int64 ``[N, M]``, the tokens asked for at each position.
        head: the output embedding.
        chunk: positions whose logits are held at once; None for a size that suits the device.

    Returns:
        float32 ``[N, M]``.
    """
    if chunk is None:
        chunk = 2048 if hidden.is_cuda else 512

    def part(h: Tensor, tokens: Tensor) -> Tensor:
        logits = F.linear(h, *head)
        if h.is_cuda:
            logits = logits.float()
        return logits.gather(-1, tokens).float() - logits.logsumexp(-1, keepdim=True).float()

    learning = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    out = []
    for h, tokens in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        if learning:
            out.append(checkpoint(part, h, tokens, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(part(h, tokens))
    return torch.cat(out) if out else hidden.new_zeros(ids.shape, dtype=torch.float32)
