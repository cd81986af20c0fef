"""Tiny random decoders of several families, with weights large enough for sharp attention."""

from __future__ import annotations

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rosakit.tuning import RosaConfig, attach, rosa_parameters

FAMILIES = ("llama", "qwen3", "mistral", "gpt_neox")
VOCABULARY = 61


def build(family: str = "llama", depth: int = 3, **changes):
    """A float32 model in eval mode; the same weights on every call."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {"num_key_value_heads": 2}
    kinds = {
        "llama": (LlamaForCausalLM, LlamaConfig, grouped),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**grouped, "head_dim": 8}),
        "mistral": (MistralForCausalLM, MistralConfig, grouped),
        "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    }
    model, config, extra = kinds[family]
    torch.manual_seed(0)
    return model(config(**{**common, **extra, **changes})).eval()


def attached(family: str = "llama", *, noise: float = 0.1, **options):
    """An attached model whose added parameters are perturbed, so that all of them matter."""
    model = attach(build(family), RosaConfig(**{"window": 9, "sink_tokens": 3, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in rosa_parameters(model).values():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def tokens(batch: int, length: int, *, kinds: int = 8, seed: int = 0) -> torch.Tensor:
    """Ids from a small alphabet, so that suffixes repeat; never pad, bos or eos."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 3 + kinds, (batch, length), generator=generator)


def pad_rows(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as a padded batch and its mask."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids as generation makes them from a padding mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)
