"""Sampling from a model in recurrent mode: the state reads every token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.models.rwkv8.models import RosaModel


def generate(
    model: RosaModel,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 0.5,
    seed: int = 0,
    stop: int | None = 0,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    Args:
        model: any of the models.
        prompt: token ids, at least one.
        tokens: largest number of new tokens.
        temperature: 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens with this much probability is drawn from.
        seed: of the draws.
        stop: token that ends the text (it is not returned); None for no end.
        vocabulary: tokens from this one on are never drawn. The published models have a few more
            than the tokenizer.

    Yields:
        New token ids.

    Raises:
        InvalidInputError: an empty prompt or an option out of range.
    """
    if not prompt:
        raise InvalidInputError("the prompt is empty; give at least one token")
    if temperature < 0 or not 0 < top_p <= 1:
        raise InvalidInputError(
            f"temperature must not be negative and top_p in (0, 1], got {temperature}, {top_p}"
        )
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(seed)
    state = model.init_state(1)
    logits = model.step(torch.tensor([list(prompt)], device=device), state)[0, -1]
    for made in range(tokens):
        token = draw(logits[:vocabulary].float().cpu(), temperature, top_p, draws)
        if token == stop:
            return
        yield token
        if made + 1 < tokens:
            logits = model.step(torch.tensor([token], device=device), state)[0]


def draw(logits: Tensor, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """One token of ``logits [V]``."""
    if temperature == 0:
        return int(logits.argmax())
    probability, order = logits.softmax(-1).sort(descending=True)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p, probability, 0.0) ** (1 / temperature)
    return int(order[torch.multinomial(kept, 1, generator=draws)])


def likeliest(
    model: RosaModel, prompt: Sequence[int], count: int = 10, vocabulary: int | None = None
) -> list[tuple[int, float]]:
    """The likeliest next tokens of a prompt (below `vocabulary`) and their probabilities."""
    device = next(model.parameters()).device
    logits = model.step(torch.tensor([list(prompt)], device=device), model.init_state(1))[0, -1]
    probability = logits.float().softmax(-1)[:vocabulary]
    values, ids = probability.topk(min(count, len(probability)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))
