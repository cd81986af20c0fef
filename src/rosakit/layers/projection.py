"""The linear maps of an adapter: whole or of low rank, its own or shared by all layers."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rosakit.errors import InvalidInputError
from rosakit.layers.graphs import outside_graphs

__all__ = ["Projection", "Projections", "WeightCopies", "copied_numbers", "version_of"]

_JOINED = 512
"""Widest q, k and v whose weights are joined for decoding: a copy of more costs too much memory,
and there a launch more hardly counts."""

_FEW = 64
"""Tokens up to which low-rank factors are joined: beyond, launches hardly count."""


def version_of(x: Tensor) -> tuple[int, int]:
    """What changes when a tensor's content does (inference tensors do not say)."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


class Projection(nn.Module):
    """A linear map without bias, ``[..., in] -> [..., out]``.

    Not an `nn.Linear`, so that tools that replace a model's linear layers by class (LoRA on all
    linear layers, quantisation) leave the adapters alone.

    Args:
        in_features, out_features: widths.
        rank: rank of the map, written as ``up @ down``; None, or a rank that would save nothing,
            for a whole matrix `weight`.
        device: where the parameters live.
        dtype: their type.

    Raises:
        InvalidInputError: a rank below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank is not None and rank < 1:
            raise InvalidInputError(f"the rank of a projection must be at least 1, got {rank}")
        self.in_features, self.out_features = in_features, out_features
        whole = rank is None or rank * (in_features + out_features) >= in_features * out_features
        self.rank = None if whole else rank

        def empty(*shape: int | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # type: ignore[arg-type]

        if whole:
            self.weight = empty(out_features, in_features)
        else:
            self.down, self.up = empty(rank, in_features), empty(out_features, rank)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def reset(self, *, zero: bool = False) -> None:
        """Draw anew, so that inputs of unit variance give outputs of unit variance.

        Args:
            zero: make the map zero, with a gradient at the first step: only its last factor is 0.
        """
        std = self.in_features**-0.5
        if self.rank is None:
            nn.init.zeros_(self.weight) if zero else nn.init.normal_(self.weight, std=std)
            return
        nn.init.normal_(self.down, std=std)
        nn.init.zeros_(self.up) if zero else nn.init.normal_(self.up, std=self.rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.rank is None:
            return F.linear(x, self.weight)
        return F.linear(F.linear(x, self.down), self.up)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"


class WeightCopies:
    """Weights of q, k and v side by side, as decoding reads them.

    A cache carries them, so that they are counted with it and go when it goes, or when the maps go;
    a copy of the cache makes its own. They are made anew when a weight has changed: another tensor,
    or a write that autograd counts (optimizer steps, `load_state_dict`, any in-place operation; not
    one through ``.data``).
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], tuple[Tensor, ...]]] = (
            WeakKeyDictionary()
        )

    @outside_graphs
    def of(
        self, owner: nn.Module, maps: list[Projection], names: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """The maps' weights side by side; the second factors stacked and turned."""
        weights = [m._parameters[name] for name in names for m in maps]
        name = tuple((version_of(w), w.dtype) for w in weights if w is not None)
        held = self._made.get(owner)
        if held is None or held[0] != name:
            given = [w.detach() for w in weights if w is not None]
            made: tuple[Tensor, ...] = (torch.cat(given[:3]),)
            if len(given) > 3:
                made = (*made, torch.stack([w.t() for w in given[3:]]).contiguous())
            held = self._made[owner] = (name, made)
        return held[1]

    @property
    def nbytes(self) -> int:
        """Bytes held on the model's device."""
        return sum(x.numel() * x.element_size() for _, made in self._made.values() for x in made)

    def clear(self) -> None:
        """Forget them."""
        self._made.clear()

    def __reduce__(self) -> tuple[type[WeightCopies], tuple[()]]:
        return WeightCopies, ()


def copied_numbers(hidden_size: int, channels: int, rank: int | None) -> int:
    """Numbers that `WeightCopies` holds for maps between these widths."""
    whole = rank is None or rank * (hidden_size + channels) >= hidden_size * channels
    if whole:
        return 3 * hidden_size * channels if channels <= _JOINED else 0
    assert rank is not None
    return 3 * rank * (hidden_size + channels)


class PlainWeights(NamedTuple):
    """The weights of maps that are their weights and nothing else.

    Attributes:
        rank: of every map, None for whole matrices.
        dtype: of every weight.
        inward: by factor (the inner one first), the weights of ``W_q``, ``W_k`` and ``W_v``,
            without ``W_k`` where keys are projected by ``W_q``.
        outward: by factor, the weight of ``W_o``.
    """

    rank: int | None
    dtype: torch.dtype
    inward: list[list[Tensor]]
    outward: list[Tensor]


class Projections(nn.Module):
    """``W_q``, ``W_k``, ``W_v``, ``W_o`` and the own value's output map (semantics section 4).

    Args:
        hidden_size: width H of the model.
        channels: width C of q, k and y.
        values: width of ``W_v``'s output, where routes share value heads; None for C.
        rank: rank of each map; None for whole matrices.
        addresses: whether there are ``W_q`` and ``W_k``.
        own_value: whether there is the own value's map.
        tied_start: start ``W_k`` as a copy of ``W_q``.
        shared_qk: no ``W_k``: keys are projected by ``W_q``.
        silent_addresses: start ``W_q`` and ``W_k`` at zero, as refinements of fixed codes.
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        hidden_size: int,
        channels: int,
        rank: int | None = None,
        *,
        values: int | None = None,
        addresses: bool = True,
        own_value: bool = False,
        tied_start: bool = True,
        shared_qk: bool = False,
        silent_addresses: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tied_start, self.silent_addresses = tied_start, silent_addresses

        def map_of(in_features: int, out_features: int) -> Projection:
            return Projection(in_features, out_features, rank, device=device, dtype=dtype)

        self.w_q = map_of(hidden_size, channels) if addresses else None
        self.w_k = map_of(hidden_size, channels) if addresses and not shared_qk else None
        self.w_v = map_of(hidden_size, channels if values is None else values)
        self.w_o = map_of(channels, hidden_size)
        self.w_own = map_of(channels, hidden_size) if own_value else None
        self.reset_parameters()

    def addresses_and_values(
        self, x: Tensor, copies: WeightCopies
    ) -> tuple[list[Tensor], Tensor | None]:
        """q, k and v ``[B, T, C]``, in one or two products where that is cheaper.

        Without gradients: the joined weights are copies. Narrower values have a product of their
        own.

        Returns:
            The three, and the tensor ``[B, T, 3 C]`` that they are views of, if there is one.
        """
        assert self.w_q is not None
        maps = [self.w_q, self.w_q if self.w_k is None else self.w_k, self.w_v]
        batch, length, _ = x.shape
        ranks = {m.rank for m in maps}
        few = batch * length <= _FEW and not torch.is_autocast_enabled(x.device.type)
        equal = self.w_v.out_features == self.w_q.out_features
        plain = equal and all(_is_plain(m, x.device) for m in maps)
        if plain and ranks == {None} and self.w_v.out_features <= _JOINED:
            (weight,) = copies.of(self, maps, ("weight",))
            joined = F.linear(x, weight)
            return list(joined.split(self.w_v.out_features, dim=-1)), joined
        if not plain or None in ranks or len(ranks) > 1 or not few:
            q = maps[0](x)
            return [q, q if self.w_k is None else maps[1](x), maps[2](x)], None
        down, up = copies.of(self, maps, ("down", "up"))
        inner = F.linear(x.reshape(batch * length, -1), down)
        rank = down.shape[0] // 3
        # [3, B T, rank] by [3, rank, C]
        parts = torch.bmm(inner.view(batch * length, 3, rank).transpose(0, 1), up)
        return [part.view(batch, length, -1) for part in parts.unbind()], None

    def plain(self, device: torch.device) -> PlainWeights | None:
        """The contiguous weights of ``W_q``, ``W_k``, ``W_v`` and ``W_o`` on the device.

        None where there are no addresses, where a map is more than its weights (hooks,
        offloading), or where weights differ in dtype or maps in rank.
        """
        w_o, rank = self.w_o, self.w_o.rank
        names = ("weight",) if rank is None else ("down", "up")
        found: list[list[Tensor]] = []
        dtype: torch.dtype | None = None
        for m in (self.w_q, self.w_k, self.w_v, w_o):
            if m is None:
                continue
            if m.rank != rank or not _is_plain(m, device):
                return None
            factors: list[Tensor] = []
            for name in names:
                w = m._parameters[name]
                if type(w) is not nn.Parameter or not w.is_contiguous():
                    return None
                dtype = dtype or w.dtype
                if w.dtype != dtype:
                    return None
                factors.append(w)
            found.append(factors)
        *inward, outward = found
        if self.w_q is None or dtype is None:
            return None
        return PlainWeights(rank, dtype, [list(ws) for ws in zip(*inward, strict=True)], outward)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Addresses and values of unit variance, outputs zero."""
        self.w_v.reset()
        for projection in (self.w_q, self.w_k):
            if projection is not None:
                projection.reset(zero=self.silent_addresses)
        if self.tied_start and self.w_q is not None and self.w_k is not None:
            self.w_k.load_state_dict(self.w_q.state_dict())
        self.w_o.reset(zero=True)
        if self.w_own is not None:
            self.w_own.reset(zero=True)


def _is_plain(projection: Projection, device: torch.device) -> bool:
    """Whether a map is its parameters and nothing else: no hook, parametrization or offloading."""
    return (
        type(projection) is Projection
        and "forward" not in projection.__dict__
        and not (projection._forward_hooks or projection._forward_pre_hooks)
        and all(p.device == device for p in projection._parameters.values() if p is not None)
    )
