"""Small random models of every family."""

from __future__ import annotations

import torch

from rosakit.models.rwkv8 import (
    CountingConfig,
    CountingModel,
    HybridConfig,
    HybridModel,
    RosaLM,
    RosaLMConfig,
)

MODELS = {
    "onlyemb": lambda: CountingModel(CountingConfig(channels=8, layers=0)),
    "alone": lambda: CountingModel(CountingConfig(channels=8, layers=1, alone=True)),
    "counting1": lambda: CountingModel(CountingConfig(channels=8, layers=2, bits=1)),
    "counting4": lambda: CountingModel(CountingConfig(channels=8, layers=4, bits=4)),
    "hybrid": lambda: HybridModel(
        HybridConfig(channels=16, head_size=8, rank=(2, 3, 4, 5), hidden=24, layers=3)
    ),
    "hybrid_without_rosa": lambda: HybridModel(
        HybridConfig(channels=16, head_size=8, rank=(2, 2, 2, 2), hidden=24, rosa=False)
    ),
    "lm1": lambda: RosaLM(RosaLMConfig(vocabulary=40, channels=8, layers=2, bits=1, hidden=16)),
    "lm4": lambda: RosaLM(RosaLMConfig(vocabulary=40, channels=8, layers=3, bits=4, hidden=32)),
}


def random_model(name, seed=0):
    """A model whose every parameter is random, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tokens_for(model, batch, length, seed=0):
    """Repetitive tokens, so that there is something to match."""
    generator = torch.Generator().manual_seed(seed)
    phrase = torch.randint(model.vocabulary, (batch, 7), generator=generator)
    tokens = phrase.repeat(1, length // 7 + 1)[:, :length]
    noise = torch.rand(batch, length, generator=generator) < 0.1
    other = torch.randint(model.vocabulary, (batch, length), generator=generator)
    return torch.where(noise, other, tokens)
