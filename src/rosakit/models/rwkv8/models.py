"""The published RWKV-8 ROSA models: counting, RWKV-7 + ROSA, and pure ROSA language models.

All take ``tokens: int64 [B, T]`` to ``logits [B, T, V]``, and in recurrent mode the next tokens of
a `rosakit.models.rwkv8.state.State`. Parameters carry the published tensor names, so a
state dict of one is a checkpoint of the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.models.rwkv8.mixing import FeedForward, TimeMix
from rosakit.models.rwkv8.recurrence import Wkv7Backend
from rosakit.models.rwkv8.rosa_layers import (
    RosaBlock,
    RosaOperator,
    RosaOptions,
    RosaStreamLayer,
    TokenMemory,
)
from rosakit.models.rwkv8.state import State
from rosakit.ops import estimators


class RosaModel(nn.Module):
    """What the models share: modes, checks and options.

    Attributes:
        config: the sizes it was made with.
        vocabulary: V.
    """

    config: Any
    vocabulary: int

    def _logits(self, tokens: Tensor, state: State | None) -> Tensor:
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        """Whole sequences: tokens int64 ``[B, T]`` to logits ``[B, T, V]``.

        Raises:
            InvalidInputError: a wrong shape, or a token outside the vocabulary.
            InvalidTypeError: tokens are not integers.
        """
        return self._logits(self._checked(tokens), None)

    def init_state(self, batch: int) -> State:
        """An empty recurrent state for `batch` rows."""
        return State(batch)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """The next tokens of every row; `state` moves on in place.

        Args:
            tokens: int64 ``[B]``, or ``[B, n]`` for n tokens at once (prefill).
            state: from `init_state`.

        Returns:
            Logits ``[B, V]`` or ``[B, n, V]``, equal to those of `forward` on everything
            that the state has seen, up to rounding.

        Raises:
            InvalidInputError: the rows do not fit the state, or a token is out of range.
        """
        single = tokens.dim() == 1
        tokens = self._checked(tokens[:, None] if single else tokens)
        state.check(tokens)
        logits = self._logits(tokens, state)
        state.length += tokens.shape[1]
        return logits[:, 0] if single else logits

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise InvalidTypeError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise InvalidInputError(
                f"tokens must have shape [B, T] with T >= 1, got {list(tokens.shape)}"
            )
        tokens = tokens.to(torch.int64)
        if not torch.compiler.is_compiling() and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocabulary:
                raise InvalidInputError(
                    f"token {low if low < 0 else high} is outside the model's vocabulary of "
                    f"{self.vocabulary}"
                )
        return tokens

    def use_estimator(
        self, name: str, options: dict[str, Any] | None = None, backend: str = "auto"
    ) -> None:
        """Choose how gradients flow through every ROSA layer.

        Args:
            name: one of ``rosakit.ops.estimators.names()``.
            options: keyword options of that estimator.
            backend: which engine matches, as in `rosakit.ops.suffix_match`.

        Raises:
            InvalidInputError: no such estimator or option.
        """
        options = options or {}
        estimators.registry.check_options(name, options)
        shared = RosaOptions(name, options, backend)
        for module in self.modules():
            if isinstance(module, RosaOperator):
                module.rosa_options = shared

    def use_wkv7(self, backend: Wkv7Backend) -> None:
        """Choose who computes RWKV-7's recurrence: a backend of `wkv7`."""
        for module in self.modules():
            if isinstance(module, TimeMix):
                module.backend = backend

    @property
    def bits(self) -> int:
        """Bits a route of the ROSA layers."""
        return int(self.config.bits)


@dataclasses.dataclass(frozen=True)
class CountingConfig:
    """Sizes of a counting model.

    Attributes:
        vocabulary: V.
        channels: C.
        layers: number of single-stream ROSA layers, 0 for the token memory alone.
        bits: bits a route.
        alone: the only ROSA layer is called ``rosa_1bit``, as in the training demo 251014.
    """

    vocabulary: int = 11
    channels: int = 64
    layers: int = 1
    bits: int = 1
    alone: bool = False


class CountingModel(RosaModel):
    """Embedding, token memory, then single-stream ROSA layers with linear maps between them.

    Source: demos 251014 (no or one layer), 251016 (1 bit, two layers), 251018 (4 bits, four).
    """

    def __init__(self, config: CountingConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        channels = config.channels
        self.e = nn.Embedding(config.vocabulary, channels)
        self.emb_rosa = TokenMemory(config.vocabulary, channels)
        for name, linear in self.layer_names(config):
            if linear:
                self.add_module(linear, nn.Linear(channels, channels))
            self.add_module(name, RosaStreamLayer(channels, config.bits))
        self.o = nn.Linear(channels, config.vocabulary)

    @staticmethod
    def layer_names(config: CountingConfig) -> list[tuple[str, str]]:
        """``(ROSA layer, linear map before it or "")`` in order."""
        if config.alone:
            return [("rosa_1bit", "")]
        linears = ["", "lin", *(f"lin{i}" for i in range(1, config.layers))]
        return [(f"rosa{i + 1}", linears[i]) for i in range(config.layers)]

    def _logits(self, tokens: Tensor, state: State | None) -> Tensor:
        x = self.e(tokens) + self.emb_rosa(tokens, state, "emb_rosa")
        for name, linear in self.layer_names(self.config):
            if linear:
                x = x + self.get_submodule(linear)(x)
            x = x + self.get_submodule(name)(x, state, name)
        return cast("Tensor", self.o(x))


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Sizes of an RWKV-7 + ROSA model.

    Attributes:
        vocabulary: V.
        channels: C.
        layers: number of layers.
        bits: bits a route of the ROSA blocks.
        head_size: N of RWKV-7.
        rank: ranks of the low-rank maps of decay, learning rate, value residual and gate.
        hidden: width of the feed-forward network.
        rosa: False leaves the ROSA blocks out (the control without memory).
    """

    vocabulary: int = 12
    channels: int = 32
    layers: int = 2
    bits: int = 1
    head_size: int = 16
    rank: tuple[int, int, int, int] = (8, 8, 8, 8)
    hidden: int = 128
    rosa: bool = True


class HybridModel(RosaModel):
    """RWKV-7 time mixing beside a ROSA block, then a feed-forward network, in every layer.

    Source: demos 251024 (arithmetic) and 251105 (reversal).
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        channels = config.channels
        self.e = nn.Embedding(config.vocabulary, channels)
        for i in range(config.layers):
            n = i + 1
            self.add_module(f"ln{n}a", nn.LayerNorm(channels))
            self.add_module(f"ln{n}b", nn.LayerNorm(channels))
            mix = TimeMix(channels, config.head_size, config.rank, i, config.layers)
            self.add_module(f"rwkv{n}", mix)
            if config.rosa:
                self.add_module(f"ln{n}c", nn.LayerNorm(channels))
                self.add_module(f"rosa{n}", RosaBlock(channels, config.bits))
            self.add_module(f"ffn{n}", FeedForward(channels, config.hidden))
        self.lno = nn.LayerNorm(channels)
        self.o = nn.Linear(channels, config.vocabulary)

    def _logits(self, tokens: Tensor, state: State | None) -> Tensor:
        x = self.e(tokens)
        part = self.get_submodule
        first_value = None
        for n in range(1, self.config.layers + 1):
            mixed, first_value = part(f"rwkv{n}")(
                part(f"ln{n}a")(x), first_value, state, f"rwkv{n}"
            )
            if self.config.rosa:
                mixed = mixed + part(f"rosa{n}")(part(f"ln{n}c")(x), state, f"rosa{n}")
            x = x + mixed
            x = x + part(f"ffn{n}")(part(f"ln{n}b")(x), state, f"ffn{n}")
        return cast("Tensor", self.o(self.lno(x)))


@dataclasses.dataclass(frozen=True)
class RosaLMConfig:
    """Sizes of a pure ROSA language model.

    Attributes:
        vocabulary: V.
        channels: C.
        layers: number of layers.
        bits: bits a route.
        hidden: width of the feed-forward network.
    """

    vocabulary: int = 65536
    channels: int = 768
    layers: int = 12
    bits: int = 1
    hidden: int = 3072


class RosaLMBlock(nn.Module):
    """ROSA block and feed-forward network, each behind a norm; block 0 norms the embedding too."""

    def __init__(self, config: RosaLMConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.channels)
        self.ln2 = nn.LayerNorm(config.channels)
        self.ln3 = nn.LayerNorm(config.channels)
        self.rosa = RosaBlock(config.channels, config.bits)
        self.ffn = FeedForward(config.channels, config.hidden)
        self.layer = layer

    def forward(self, x: Tensor, state: State | None) -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``; with a state, the next T positions."""
        if self.layer == 0:
            x = self.ln0(x)
        x = x + self.rosa(self.ln3(x), state, f"{self.layer}.rosa")
        return x + cast("Tensor", self.ffn(self.ln2(x), state, f"{self.layer}.ffn"))


class RosaLM(RosaModel):
    """Pure ROSA language model: no attention, no RWKV recurrence.

    Source: demos 260212 (1 bit) and 260222 (4 bits), 12 layers of 768 channels.
    """

    def __init__(self, config: RosaLMConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        self.emb = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(RosaLMBlock(config, i) for i in range(config.layers))
        self.ln_out = nn.LayerNorm(config.channels)
        self.head = nn.Linear(config.channels, config.vocabulary, bias=False)

    def _logits(self, tokens: Tensor, state: State | None) -> Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x, state)
        return cast("Tensor", self.head(self.ln_out(x)))


def parameters_of(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
