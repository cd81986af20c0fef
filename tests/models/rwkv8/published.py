"""Tensor names and shapes of every published checkpoint, written down from the published scripts.

Nothing here comes from the package's own modules: a model that renames or reshapes a parameter
no longer loads these.
"""

from __future__ import annotations

import torch


def _linear(name, outputs, inputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def counting(channels, roses, linears):
    """251014, 251016, 251018: names of the ROSA layers and of the linear maps between them."""
    shapes = {"e.weight": (11, channels), "emb_rosa.emb.weight": (11, channels)}
    for name in roses:
        shapes |= {f"{name}.emb0": (1, 1, channels), f"{name}.emb1": (1, 1, channels)}
    for name in linears:
        shapes |= _linear(name, channels, channels)
    return shapes | _linear("o", 11, channels)


def _rosa_block(name, channels):
    shapes = {f"{name}.x_{n}": (1, 1, channels) for n in "qkv"}
    for n in "qkvo":
        shapes |= _linear(f"{name}.{n}", channels, channels)
    return shapes | {f"{name}.rosa_qkv.emb": (1, 1, channels)}


def hybrid(vocabulary, channels, layers, rank):
    """251024, 251105, 260123: RWKV-7 with heads of 16 beside a QKV block."""
    shapes = {"e.weight": (vocabulary, channels)}
    for n in range(1, layers + 1):
        for letter in "abc":
            shapes |= _norm(f"ln{n}{letter}", channels)
        mix = f"rwkv{n}"
        shapes |= {f"{mix}.x_{x}": (1, 1, channels) for x in "rwkvag"}
        for x in "wavg":
            shapes |= {f"{mix}.{x}1": (channels, rank), f"{mix}.{x}2": (rank, channels)}
        shapes |= {f"{mix}.{x}0": (1, 1, channels) for x in "wav"}
        shapes |= {f"{mix}.k_k": (1, 1, channels), f"{mix}.k_a": (1, 1, channels)}
        shapes |= {f"{mix}.r_k": (channels // 16, 16)}
        for x in ("receptance", "key", "value", "output"):
            shapes |= _linear(f"{mix}.{x}", channels, channels, bias=False)
        shapes |= _norm(f"{mix}.ln_x", channels) | _rosa_block(f"rosa{n}", channels)
        shapes |= {f"ffn{n}.x_k": (1, 1, channels)}
        shapes |= _linear(f"ffn{n}.key", 4 * channels, channels, bias=False)
        shapes |= _linear(f"ffn{n}.value", channels, 4 * channels, bias=False)
    return shapes | _norm("lno", channels) | _linear("o", vocabulary, channels)


def language_model(vocabulary, channels, layers):
    """260212 and 260222: an idle `ln0` in every block."""
    shapes = {"emb.weight": (vocabulary, channels)}
    for n in range(layers):
        block = f"blocks.{n}"
        for x in ("ln0", "ln2", "ln3"):
            shapes |= _norm(f"{block}.{x}", channels)
        shapes |= _rosa_block(f"{block}.rosa", channels)
        shapes |= {f"{block}.ffn.x_k": (1, 1, channels)}
        shapes |= _linear(f"{block}.ffn.key", 4 * channels, channels, bias=False)
        shapes |= _linear(f"{block}.ffn.value", channels, 4 * channels, bias=False)
    return shapes | _norm("ln_out", channels) | _linear("head", vocabulary, channels, bias=False)


FILES = {
    # name: (shapes, family, layers, bits)
    "251014_rosa_onlyemb": (counting(64, [], []), "counting", 0, 1),
    "251014_rosa_1bit": (counting(64, ["rosa_1bit"], []), "counting", 1, 1),
    "251016_rosa_1bit_run": (counting(32, ["rosa1", "rosa2"], ["lin"]), "counting", 2, 1),
    "251018_rosa_4bit_run": (
        counting(64, ["rosa1", "rosa2", "rosa3", "rosa4"], ["lin", "lin1", "lin2"]),
        "counting",
        4,
        4,
    ),
    "251024_rosaQKV_L2_digit20": (hybrid(13, 128, 2, 16), "hybrid", 2, 1),
    "251024_rosaQKV_L4_digit40": (hybrid(13, 128, 4, 16), "hybrid", 4, 1),
    "251105_reverse_L2": (hybrid(12, 32, 2, 8), "hybrid", 2, 1),
    "260123_reverse_L2": (hybrid(12, 32, 2, 8), "hybrid", 2, 1),
    "260123_reverse_L2_only_rwkv7": (hybrid(12, 32, 2, 8), "hybrid", 2, 1),
    # The two language models have 65536 tokens and 768 channels: see FULL_SIZE.
    "rwkv-rosa1bit-minipile-loss3dot81-20260212-ctx512": (
        language_model(96, 24, 12),
        "lm",
        12,
        1,
    ),
    "rwkv-rosa4bit-minipile-loss3dot44-20260221-ctx512": (
        language_model(96, 24, 12),
        "lm",
        12,
        4,
    ),
}

FULL_SIZE = {
    name: language_model(65536, 768, 12)
    for name, (_, family, _, _) in FILES.items()
    if family == "lm"
}


def random_tensors(name, seed=0):
    """Random tensors of the published names and shapes; decay and norms in their usual range."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor, shape in FILES[name][0].items():
        noise = torch.randn(shape, generator=generator)
        scale = shape[-1] ** -0.5 if len(shape) == 2 and "emb" not in tensor else 0.3
        tensors[tensor] = noise * scale + (1.0 if ".ln" in f".{tensor}" else 0.0)
    return tensors
