"""Scoring the tokens of a sequence: what perplexity and needles are both computed from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError

__all__ = ["LabelScores", "Progress", "Scorer", "model_scorer", "score_labels"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` after each step of something long."""

_CHUNK = 2**25
"""Logits scored at a time (float32 copies of a whole vocabulary are what memory goes to)."""


class LabelScores(NamedTuple):
    """How a model rates the next token at every position.

    Attributes:
        log_prob: float32 ``[B, T - 1]``, log probability of token ``t + 1`` after ``0..t``, nats;
            the last entries only, if no more were asked for.
        greedy: bool of that shape, whether that token is the most probable one.
    """

    log_prob: Tensor
    greedy: Tensor


class Scorer(Protocol):
    """Scores sequences with one or several variants at once.

    Variants that share a frozen base share its forward pass.
    """

    def __call__(
        self, input_ids: Tensor, mask: Tensor | None = None, keep: int | None = None
    ) -> dict[str, LabelScores]:
        """Score ``input_ids [B, T]``.

        Args:
            input_ids: int64, on the model's device.
            mask: bool ``[B, T]`` of right padding, whose scores mean nothing; None for no padding.
            keep: score the last `keep` tokens only; None for all but the first.

        Returns:
            The scores of each variant by name.
        """
        ...


def score_labels(logits: Tensor, labels: Tensor) -> LabelScores:
    """Score labels under logits (or log probabilities).

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]``.
    """
    batch, length, vocabulary = logits.shape
    step = max(1, _CHUNK // (batch * vocabulary))
    log_prob = torch.empty((batch, length), dtype=torch.float32, device=logits.device)
    greedy = torch.empty((batch, length), dtype=torch.bool, device=logits.device)
    for start in range(0, length, step):
        part = slice(start, start + step)
        work = logits[:, part].float()
        label = labels[:, part, None]
        log_prob[:, part] = (work.gather(-1, label) - work.logsumexp(-1, keepdim=True))[..., 0]
        greedy[:, part] = work.argmax(-1, keepdim=True).eq(label)[..., 0]
    return LabelScores(log_prob, greedy)


def model_scorer(model: Any, name: str = "model") -> Scorer:
    """A scorer that runs a causal language model, whatever is attached to it.

    Args:
        model: called as ``model(input_ids=..., attention_mask=..., use_cache=False)``; returns an
            object with ``.logits [B, T, V]``.
        name: name of the variant.
    """

    selective = "logits_to_keep" in inspect.signature(model.forward).parameters

    def score(
        input_ids: Tensor, mask: Tensor | None = None, keep: int | None = None
    ) -> dict[str, LabelScores]:
        keep = input_ids.shape[1] - 1 if keep is None else keep
        options: dict[str, Any] = {"logits_to_keep": keep + 1} if selective else {}
        if mask is not None:
            options["attention_mask"] = mask.to(torch.int64)
        with evaluating(model):
            logits = model(input_ids=input_ids, use_cache=False, **options).logits
            return {name: score_labels(logits[:, -keep - 1 : -1], input_ids[:, -keep:])}

    return score


class evaluating:
    """Evaluation mode without gradients for the time of a ``with`` block."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._guard = torch.inference_mode()

    def __enter__(self) -> None:
        self._training = self.model.training
        self.model.eval()
        self._guard.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._guard.__exit__(*exception)
        self.model.train(self._training)


def device_of(model: Any) -> torch.device:
    """Where the model's inputs belong.

    Raises:
        InvalidInputError: a model without parameters.
    """
    device = getattr(model, "device", None)
    if isinstance(device, torch.device):
        return device
    for parameter in model.parameters():
        return torch.device(parameter.device)
    raise InvalidInputError(f"{type(model).__name__} has no parameters, so nothing can be scored")
