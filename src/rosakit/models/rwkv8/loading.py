"""From a checkpoint to a model: which one it is, and how large, from tensor names and shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.models.rwkv8 import checkpoint
from rosakit.models.rwkv8.models import (
    CountingConfig,
    CountingModel,
    HybridConfig,
    HybridModel,
    RosaLM,
    RosaLMConfig,
    RosaModel,
)

_PUBLISHED_COUNTING_BITS = {0: 1, 1: 1, 2: 1, 4: 4}
"""Bits of the published counting demos by number of layers (251014, 251016, 251018)."""


def load(
    path: str | os.PathLike[str],
    bits: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    strict: bool = True,
) -> RosaModel:
    """Load a published RWKV-8 ROSA checkpoint, or one that training here wrote.

    The family and every size are read off the tensors' names and shapes. Bits a route do not show
    in the tensors; they are taken from the first of: `bits`, the file's own metadata, its name
    ("rosa_4bit", as all published files are called), the published demo of that shape.

    Args:
        path: ``.pth`` (read weights-only), ``.npz``, ``.safetensors``, or a training run's folder.
        bits: 1 or 4.
        device: where the model goes.
        dtype: dtype of its parameters.
        strict: False ignores tensors that the model does not have. Missing ones are always an
            error: a model with random parts is never returned.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the file cannot be read, its tensors are of no known model, do not fit
            together, or leave the bits open.
        InvalidInputError: `bits` is neither 1 nor 4.
    """
    if bits not in (None, 1, 4):
        raise InvalidInputError(f"bits must be 1 or 4 (or None to infer them), got {bits}")
    source = checkpoint.read(path)
    model = _empty_model(source, bits)
    tensors = dict(source.tensors)
    if isinstance(model, RosaLM):
        # The published script makes this norm in every block and uses that of block 0 only.
        for name in [n for n in tensors if ".ln0." in n and not n.startswith("blocks.0.")]:
            del tensors[name]
    expected = {name: x.shape for name, x in model.state_dict().items()}
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    if missing:
        raise CheckpointError(
            f"{source.path} looks like a {_describe(model)} but lacks {_some(missing)}; "
            "the file is incomplete"
        )
    if unknown and strict:
        raise CheckpointError(
            f"{source.path} looks like a {_describe(model)} but also holds {_some(unknown)}, "
            "which that model does not have; it may be of a newer variant. Pass strict=False to "
            "ignore them"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name} has shape {list(tensors[name].shape)} where the "
                f"{_describe(model)} has {list(shape)}; the tensors do not fit together"
            )
    model.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return model.to(device=device, dtype=dtype).requires_grad_(True).eval()


def save(model: RosaModel, path: str | os.PathLike[str]) -> None:
    """Write a model as ``.safetensors`` under its published tensor names, atomically.

    Raises:
        CheckpointError: another suffix, or the file cannot be written.
    """
    checkpoint.write(model, path, {"family": family_of(model), "bits": str(model.bits)})


def family_of(model: RosaModel) -> str:
    """ "counting", "hybrid" or "lm"."""
    names = {CountingModel: "counting", HybridModel: "hybrid", RosaLM: "lm"}
    return names[type(model)]


def _empty_model(source: checkpoint.Checkpoint, bits: int | None) -> RosaModel:
    names = source.tensors
    with torch.device("meta"):  # shapes only: the tensors take their places
        if "emb_rosa.emb.weight" in names:
            return _counting(source, bits)
        if "blocks.0.rosa.q.weight" in names:
            return _language_model(source, bits)
        if "rwkv1.r_k" in names:
            return _hybrid(source, bits)
    raise CheckpointError(
        f"{source.path} is no RWKV-8 ROSA model that is known here: expected tensors such as "
        "'emb_rosa.emb.weight' (counting), 'rwkv1.r_k' (RWKV-7 + ROSA) or "
        f"'blocks.0.rosa.q.weight' (language model); it holds {_some(sorted(names))}"
    )


def _counting(source: checkpoint.Checkpoint, bits: int | None) -> CountingModel:
    tensors = source.tensors
    alone = "rosa_1bit.emb0" in tensors
    layers = 1 if alone else _count(tensors, "rosa{}.emb0", first=1)
    fallback = 1 if alone else _PUBLISHED_COUNTING_BITS.get(layers)
    vocabulary, channels = _shape(source, "e.weight", 2)
    resolved = _bits(source, bits, fallback)
    return CountingModel(CountingConfig(vocabulary, channels, layers, resolved, alone))


def _hybrid(source: checkpoint.Checkpoint, bits: int | None) -> HybridModel:
    vocabulary, channels = _shape(source, "e.weight", 2)
    layers = _count(source.tensors, "rwkv{}.r_k", first=1)
    ranks = tuple(_shape(source, f"rwkv1.{name}1", 2)[1] for name in "wavg")
    config = HybridConfig(
        vocabulary,
        channels,
        layers,
        _bits(source, bits, 1),  # every published one has 1 bit
        _shape(source, "rwkv1.r_k", 2)[1],
        (ranks[0], ranks[1], ranks[2], ranks[3]),
        _shape(source, "ffn1.key.weight", 2)[0],
        rosa="rosa1.q.weight" in source.tensors,
    )
    return HybridModel(config)


def _language_model(source: checkpoint.Checkpoint, bits: int | None) -> RosaLM:
    vocabulary, channels = _shape(source, "emb.weight", 2)
    config = RosaLMConfig(
        vocabulary,
        channels,
        _count(source.tensors, "blocks.{}.rosa.q.weight", first=0),
        _bits(source, bits, None),
        _shape(source, "blocks.0.ffn.key.weight", 2)[0],
    )
    return RosaLM(config)


def _bits(source: checkpoint.Checkpoint, asked: int | None, fallback: int | None) -> int:
    said = source.metadata.get("bits")
    if said is not None and asked is not None and int(said) != asked:
        raise CheckpointError(
            f"{source.path} says that it has {said} bits a route, but bits={asked} was asked for; "
            "leave bits out"
        )
    for choice in (asked, None if said is None else int(said), source.named_bits, fallback):
        if choice is not None:
            return choice
    raise CheckpointError(
        f"{source.path}: models of 1 and of 4 bits a route have the same tensors, and neither the "
        "file nor its name says which this is; pass bits=1 or bits=4"
    )


def _count(tensors: Mapping[str, Tensor], pattern: str, first: int) -> int:
    n = 0
    while pattern.format(first + n) in tensors:
        n += 1
    return n


def _shape(source: checkpoint.Checkpoint, name: str, dims: int) -> tuple[int, ...]:
    if name not in source.tensors:
        raise CheckpointError(f"{source.path} lacks tensor {name}; the file is incomplete")
    shape = tuple(source.tensors[name].shape)
    if len(shape) != dims:
        raise CheckpointError(
            f"{source.path}: tensor {name} has shape {list(shape)}, expected {dims} dimensions"
        )
    return shape


def _describe(model: RosaModel) -> str:
    config = model.config
    return f"{family_of(model)} model of {config.layers} layers and {config.channels} channels"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
