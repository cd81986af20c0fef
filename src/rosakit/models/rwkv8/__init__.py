"""RWKV-8 "Heron" ROSA models: the published checkpoints, and training them.

>>> from rosakit.models import rwkv8
>>> model = rwkv8.load("251105_reverse_L2.pth")
>>> logits = model(tokens)                      # int64 [B, T] -> [B, T, V]
>>> state = model.init_state(batch=1)
>>> logits = model.step(tokens[:, 0], state)    # the recurrent mode, same numbers
"""

from __future__ import annotations

from rosakit.models.rwkv8.generation import generate
from rosakit.models.rwkv8.loading import load, save
from rosakit.models.rwkv8.mixing import FeedForward, TimeMix
from rosakit.models.rwkv8.models import (
    CountingConfig,
    CountingModel,
    HybridConfig,
    HybridModel,
    RosaLM,
    RosaLMConfig,
    RosaModel,
)
from rosakit.models.rwkv8.recurrence import wkv7
from rosakit.models.rwkv8.rosa_layers import RosaBlock, RosaQkvLayer, RosaStreamLayer, TokenMemory
from rosakit.models.rwkv8.state import State
from rosakit.models.rwkv8.tokenizer import WorldTokenizer

__all__ = [
    "CountingConfig",
    "CountingModel",
    "FeedForward",
    "HybridConfig",
    "HybridModel",
    "RosaBlock",
    "RosaLM",
    "RosaLMConfig",
    "RosaModel",
    "RosaQkvLayer",
    "RosaStreamLayer",
    "State",
    "TimeMix",
    "TokenMemory",
    "WorldTokenizer",
    "generate",
    "load",
    "save",
    "wkv7",
]
