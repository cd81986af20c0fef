"""`InjectedAdapter`: a RosaAdapter as a sibling of a decoder layer's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.adapter import Begun
from rosakit.layers.step import step
from rosakit.tuning.context import Shared


class InjectedAdapter(nn.Module):
    """Holds an adapter and the hooks that connect it (semantics section 4).

    Hooks are bound methods, so that a deepcopy of the model hooks the copy's adapter.

    ``pre_attn`` is computed as ``norm(h + sigmoid(alpha) / (1 - sigmoid(alpha)) inj)``. The norms
    of decoders ignore the scale of their input (up to their epsilon), so this is
    ``norm((1 - sigmoid(alpha)) h + sigmoid(alpha) inj)``; it leaves ``h`` untouched bit for bit
    while the injection is zero, and the ratio is simply ``exp(alpha)``.

    Args:
        adapter: the adapter.
        shared: where the current forward pass is found.
    """

    def __init__(self, adapter: RosaAdapter, shared: Shared) -> None:
        super().__init__()
        self.adapter = adapter
        self._shared = shared
        self._residual: Tensor | None = None
        self._begun: Begun | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the attention: starts the match that `post_attn` reads.

        A recomputation under gradient checkpointing runs both hooks again; what one that stopped
        halfway has begun is dropped here.
        """
        if self._silent(module, kwargs):
            return
        u, context = self._input(module, args, kwargs)
        self._begun = self.adapter.begin(u, context)

    def post_attn(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook on the attention: adds the injection to its output."""
        # A step of decoding comes by here for every layer: attributes of modules are slow to set.
        begun = self._begun
        if begun is not None:
            self._begun = None
        forward = self._shared.context_of(module, kwargs)
        if forward.silent:
            return None
        u, context = _hidden(args, kwargs), forward.rosa
        first = output[0] if isinstance(output, tuple) else output
        adapter: Any = self._modules["adapter"]
        summed = step(adapter, u, context, first)
        if summed is None:
            injected = adapter(self._readable(u), context, begun)
            summed = first + injected.to(first.dtype)
        return (summed, *output[1:]) if isinstance(output, tuple) else summed

    def norm_input(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook on the norm in front of the attention: keeps its input ``h``."""
        self._residual = args[0]

    def pre_attn(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook on the attention: replaces its input by the mixed one."""
        assert self.adapter.alpha is not None
        h, self._residual = self._residual, None
        if self._silent(module, kwargs):
            return None
        assert h is not None
        injected = self.adapter(*self._input(module, args, kwargs))
        mixed = h + (self.adapter.alpha.float().exp() * injected.float()).to(h.dtype)
        # `forward`, not a call: the norm's hook must not see its own second use.
        mixed = self._norm().forward(mixed)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": mixed}
        return (mixed, *args[1:]), kwargs

    def _silent(self, module: nn.Module, kwargs: dict[str, Any]) -> bool:
        """Whether this pass shows the model without its adapters."""
        return self._shared.context_of(module, kwargs).silent

    def set_norm(self, norm: nn.Module) -> None:
        """Name the norm in front of the attention (kept out of the module tree)."""
        self.__dict__["_norm_module"] = norm

    def _norm(self) -> Any:
        return self.__dict__["_norm_module"]

    def _input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, RosaContext]:
        """What the adapter reads: the attention's own input, in the adapter's dtype."""
        context = self._shared.context_of(module, kwargs).rosa
        return self._readable(_hidden(args, kwargs)), context

    def _readable(self, u: Tensor) -> Tensor:
        """The hidden states in the adapter's dtype, unless autocast sees to it."""
        return u if torch.is_autocast_enabled(u.device.type) else u.to(self.adapter.v_proj.dtype)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden
