"""Tiny random models of every architecture in the support matrix."""

from __future__ import annotations

from typing import Any

import torch
import transformers

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "_config": "TextConfig"},
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", {}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {"n_inner": 48, "_model": "LMHeadModel"}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 64}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("Bloom", {}),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 3}),
    "mamba": ("Mamba", {}),
}
"""Name to the prefix of its classes and what its configuration needs beside the common part."""


def build_architecture(name: str, *, implementation: str | None = None, depth: int = 3) -> Any:
    """A float32 model in eval mode; the same weights on every call."""
    prefix, extra = ARCHITECTURES[name]
    extra = dict(extra)
    config_class = getattr(transformers, prefix + extra.pop("_config", "Config"))
    common = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": implementation,
    }
    model_class = getattr(transformers, prefix + extra.pop("_model", "ForCausalLM"))
    torch.manual_seed(0)
    config = config_class(**{**common, **extra})
    return model_class(config).eval()
