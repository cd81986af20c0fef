"""A frozen decoder in two halves: the lower one is computed once, the upper one is trained on it.

With adapters in the upper layers only, what enters them depends on the text alone. It is computed
once for all variants and seeds, which then cost the upper layers and the output embedding.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosakit.tuning import RosaConfig, attach
from rosakit.tuning.modules import decoder_of


class Given(nn.Module):
    """Stands for the embedding: returns the hidden states that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    @classmethod
    def of(cls, half: Any) -> Given:
        """The one in an upper half."""
        found = decoder_of(half).embed_tokens
        assert isinstance(found, cls)
        return found

    def take(self, hidden: Tensor, device: torch.device, rows: Tensor) -> None:
        """Give these rows of ``hidden [N, T, H]`` to the next forward pass."""
        self.hidden = hidden[rows].to(device)

    def forward(self, input_ids: Tensor) -> Tensor:
        assert self.hidden is not None
        assert self.hidden.shape[:2] == input_ids.shape
        return self.hidden


def lower_half(model: Any, cut: int) -> Any:
    """The layers below `cut`, ending in the hidden states that layer `cut` reads."""
    half = copy.deepcopy(model)
    decoder = decoder_of(half)
    _keep(decoder, range(cut))
    decoder.norm = nn.Identity()
    return half


def upper_half(model: Any, cut: int) -> Any:
    """The layers from `cut` on; their input is given (see `Given`)."""
    half = copy.deepcopy(model)
    decoder = decoder_of(half)
    _keep(decoder, range(cut, decoder.config.num_hidden_layers))
    decoder.embed_tokens = Given()
    return half


def _keep(decoder: Any, wanted: range) -> None:
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in wanted)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in wanted]
    config.num_hidden_layers = len(wanted)


@torch.no_grad()
def compute_hidden(
    model: Any, rows: Tensor, path: Path, *, cut: int, window: int | None, sinks: int
) -> None:
    """Write what layer `cut` reads for each row: ``[N, T, H]`` in the model's dtype.

    Args:
        model: the plain model.
        rows: token ids ``[N, T]``.
        path: file of raw numbers, made anew.
        window: attention window; None for full attention.
    """
    half = lower_half(model, cut)
    if window is not None:
        attach(half, RosaConfig(window=window, sink_tokens=sinks, adapters=False))
    decoder = decoder_of(half)
    device, dtype = next(half.parameters()).device, next(half.parameters()).dtype
    store = open_hidden(path, rows, half.config.hidden_size, dtype, new=True)
    for begin in range(0, len(rows), 4):
        ids = rows[begin : begin + 4].to(device, torch.int64)
        hidden = decoder(input_ids=ids, use_cache=False)[0]
        store[begin : begin + 4] = hidden.to("cpu")


def open_hidden(
    path: Path, rows: Tensor, width: int, dtype: torch.dtype, *, new: bool = False
) -> Tensor:
    """The file of `compute_hidden` as a tensor that shares its memory."""
    shape = (*rows.shape, width)
    if new:
        path.unlink(missing_ok=True)
    size = rows.numel() * width
    found: Tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    return found.view(shape)
