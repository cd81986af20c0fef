"""The ROSA layers of RWKV-8: one stream (October 2025) and query, key, value (from then on).

What a position without match reads differs between the published layers and is kept:

======================  =======================  ==================
layer                   matched bit 0 / bit 1    no match
======================  =======================  ==================
one stream, 1 bit       ``emb0`` / ``emb1``      exact 0
one stream, 4 bits      ``emb0`` / ``emb1``      ``emb0``
q, k, v, 1 bit          ``-emb`` / ``emb``       ``-emb``
q, k, v, 4 bits         ``-emb`` / ``emb``       exact 0
======================  =======================  ==================

Source: BlinkDL/RWKV-LM, folder RWKV-v8, scripts 251014, 251018, 251024 and 260222.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rosakit import symbols
from rosakit.errors import InvalidInputError
from rosakit.models.rwkv8.state import RosaState, State
from rosakit.ops import rosa, suffix_match


class RosaOptions:
    """How gradients flow through the ROSA layers of a model; shared by all of them.

    Attributes:
        estimator: a name of ``rosakit.ops.estimators.names()``.
        options: keyword options of that estimator.
        backend: as in `rosakit.ops.suffix_match`.
    """

    def __init__(
        self,
        estimator: str = "counterfactual",
        options: dict[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        self.estimator, self.options, self.backend = estimator, options or {}, backend


def _check_bits(channels: int, bits: int) -> None:
    if bits not in (1, 4):
        raise InvalidInputError(f"RWKV-8's ROSA layers have 1 or 4 bits a route, got {bits}")
    symbols.routes_of(channels, bits)


def _read(
    state: RosaState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    bits: int,
) -> Tensor:
    """The streaming form of ``rosa``: the next ``[B, n, C]`` of each."""
    qs, ks, vs = (symbols.pack(x, bits) for x in (q, k, v))
    value, matched = state.extend(qs, ks, vs)
    y = torch.where(symbols.unpack(value, bits), e1.to(v.dtype), e0.to(v.dtype))
    fill = y.new_zeros(()) if e_null is None else e_null.to(v.dtype)
    return torch.where(matched.repeat_interleave(bits, 1).transpose(1, 2), y, fill)


class RosaOperator(nn.Module):
    """What the two kinds of layers share: the choice between whole sequence and step."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        _check_bits(channels, bits)
        self.channels, self.bits = channels, bits
        self.rosa_options = RosaOptions()

    def _apply_rosa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
        state: State | None,
        name: str,
    ) -> Tensor:
        if state is not None:
            stream = state.rosa(name, self.channels // self.bits, self.bits, q.device)
            return _read(stream, q, k, v, e0, e1, e_null, self.bits)
        how = self.rosa_options
        options = dict(how.options)
        if q is v and how.estimator == "bitflip":
            # One stream: a flipped bit is a flipped query, key and value bit (demo 251014).
            options.setdefault("tied", True)
        y = rosa(
            q,
            k,
            v,
            e0,
            e1,
            bits=self.bits,
            estimator=how.estimator,
            unmatched="zero" if e_null is None else "null",
            e_null=e_null,
            backend=how.backend,
            **options,
        )
        return cast("Tensor", y)


class RosaStreamLayer(RosaOperator):
    """One stream of symbols is query, key and value at once.

    Args:
        channels: C, a multiple of `bits`.
        bits: 1 or 4 bits a route.
        scale: size of the initial embeddings, ``emb0 = -scale`` and ``emb1 = scale``.
    """

    def __init__(self, channels: int, bits: int, scale: float = 1e-5) -> None:
        super().__init__(channels, bits)
        self.emb0 = nn.Parameter(torch.full((1, 1, channels), -scale))
        self.emb1 = nn.Parameter(torch.full((1, 1, channels), scale))

    def forward(self, x: Tensor, state: State | None = None, name: str = "") -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``; with a state, the next T positions."""
        e0, e1 = self.emb0.flatten(), self.emb1.flatten()
        e_null = None if self.bits == 1 else e0
        return self._apply_rosa(x, x, x, e0, e1, e_null, state, name)


class RosaQkvLayer(RosaOperator):
    """Queries look among keys and read values; the output is ``+emb`` or ``-emb``.

    Args:
        channels: C, a multiple of `bits`.
        bits: 1 or 4 bits a route.
    """

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__(channels, bits)
        self.emb = nn.Parameter(torch.ones(1, 1, channels))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, name: str = ""
    ) -> Tensor:
        """``q, k, v [B, T, C]`` to ``[B, T, C]``; with a state, the next T positions."""
        e1 = self.emb.flatten()
        e0 = -e1
        return self._apply_rosa(q, k, v, e0, e1, e0 if self.bits == 1 else None, state, name)


def time_shift(x: Tensor, state: State | None, name: str) -> Tensor:
    """``[B, T, C]`` moved one position later; the first reads the state, or zeros."""
    last = None
    if state is not None:
        last = state.swap(name, x[:, -1].detach())
    if last is None:
        last = torch.zeros_like(x[:, 0])
    return torch.cat([last[:, None], x[:, :-1]], dim=1)


class RosaBlock(nn.Module):
    """Time shift, projections, ROSA and output projection (RWKV-8's QKV block).

    Args:
        channels: C.
        bits: 1 or 4 bits a route.
    """

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.x_q = nn.Parameter(torch.zeros(1, 1, channels))
        self.x_k = nn.Parameter(torch.zeros(1, 1, channels))
        self.x_v = nn.Parameter(torch.zeros(1, 1, channels))
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.rosa_qkv = RosaQkvLayer(channels, bits)
        self.o = nn.Linear(channels, channels)

    def forward(self, x: Tensor, state: State | None = None, name: str = "") -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``; with a state, the next T positions."""
        delta = time_shift(x, state, f"{name}.shift") - x
        q = self.q(x + delta * self.x_q)
        k = self.k(x + delta * self.x_k)
        v = self.v(x + delta * self.x_v)
        y: Tensor = self.o(self.rosa_qkv(q, k, v, state, name))
        return y


class TokenMemory(nn.Module):
    """Embedding of the token that followed the longest earlier match; zeros where none did.

    Args:
        vocabulary: V.
        channels: C.
    """

    def __init__(self, vocabulary: int, channels: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, channels)
        # Small vocabularies fit the narrow symbols that every engine takes.
        self.bits = 8 if vocabulary <= 256 else None

    def forward(self, tokens: Tensor, state: State | None = None, name: str = "") -> Tensor:
        """Tokens int64 ``[B, T]`` to ``[B, T, C]``; with a state, the next T positions."""
        narrow = torch.uint8 if self.bits else torch.int32
        stream = tokens.to(narrow)[:, None].contiguous()
        if state is None:
            position = suffix_match(stream, stream).position[:, 0]
            matched = position >= 0
            predicted = tokens.gather(1, position.clamp(min=0).to(torch.int64))
        else:
            memory = state.rosa(name, 1, self.bits, tokens.device)
            value, found = memory.extend(stream, stream, stream)
            predicted, matched = value[:, 0].to(torch.int64), found[:, 0]
        y: Tensor = self.emb(predicted)
        return torch.where(matched[..., None], y, torch.zeros((), dtype=y.dtype, device=y.device))
