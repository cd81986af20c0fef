"""A decoding step of one adapter on a GPU, from what the attention read to the sum with its output.

The same numbers as `RosaAdapter.forward` and an addition, up to rounding. A model that decodes one
token waits for its host, so what counts here is host work: a step is a handful of launches that are
prepared once, by address, and repeated while weights and state lie where they lay. What is written
over between steps is no more than the addresses of input and output and the position.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosakit.cuda import compile, project
from rosakit.cuda.project import FORMATS
from rosakit.cuda.stream import STEPS, StreamMemory
from rosakit.layers.device_state import DeviceState

if TYPE_CHECKING:
    from rosakit.layers.adapter import RosaAdapter
    from rosakit.layers.context import RosaContext
    from rosakit.layers.state import RosaStates

__all__ = ["TOKENS", "step"]

TOKENS = 16
"""Tokens of all rows up to which weights are read once a token; beyond, library products are
faster."""


def step(adapter: RosaAdapter, u: Tensor, context: RosaContext, onto: Tensor) -> Tensor | None:
    """``onto`` plus what the adapter injects for ``u``, where this call can take the short way.

    Args:
        adapter: the adapter.
        u: the normalised hidden states ``[B, T, H]``, of any dtype.
        context: the running pass.
        onto: ``[B, T, H]``, what the injection is added to.

    Returns:
        A new tensor like `onto`; None where the long way has to be taken, and nothing has changed.
    """
    states = context.states
    if states is None or torch.compiler.is_compiling():
        return None
    if context.short is None:
        context.short = _is_short(context)
    state = states.adapters.get(adapter.layer_index)
    # Before the first chunk, which takes the long way, there is no state.
    if not context.short or type(state) is not DeviceState or not state.admits(adapter, u.shape[1]):
        return None
    given, added = u.data_ptr(), onto.data_ptr()
    if given % 16 or not (u.is_contiguous() and onto.is_contiguous()):
        return None
    kind = (u.shape, onto.shape, u.dtype, onto.dtype)
    state.memory.reserve(kind[0][1])  # before the recipe, which names the tables
    recipe = state.recipes.get(kind)
    if recipe is None or not recipe.serves(adapter, state.memory):
        if recipe is not None:
            state.recipes.clear()  # what has moved has moved for all of them; they keep it alive
        recipe = _prepared(adapter, u, onto, states, state)
        if recipe is None:
            return None
        state.recipes[kind] = recipe
    out = torch.empty_like(onto)
    recipe.run(given, added, out.data_ptr(), context.mask)
    return out


def _is_short(context: RosaContext) -> bool:
    """Whether steps of this pass can take the short way at all."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.is_autocast_enabled("cpu")
        or context.keep_inputs
        or context.record
    )


class Weights:
    """The parameters that an adapter's step reads, and what shows that they still are the same.

    Looked up by hand: attributes of modules cost more than everything else here.

    Args:
        adapter: the adapter.
    """

    def __init__(self, adapter: RosaAdapter) -> None:
        maps = adapter.projections
        modules = [adapter, *(m for m in maps._modules.values() if m is not None)]
        self._places = [(maps._modules, name, m) for name, m in maps._modules.items()]
        self._held = [
            (m._parameters, name, p, *((0, None) if p is None else (p.data_ptr(), p.dtype)))
            for m in modules
            for name, p in m._parameters.items()
        ]
        self._empty = [d for m in modules for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        self._maps, self._levels = maps, adapter._parameters

    def same(self, adapter: RosaAdapter) -> bool:
        """Whether they lie where they lay, in the same format, and nothing was put around them."""
        if adapter._parameters is not self._levels:  # another adapter, maybe with the same maps
            return False
        for places, name, module in self._places:
            if places.get(name) is not module:
                return False
        for table, name, parameter, address, dtype in self._held:
            if table.get(name) is not parameter:
                return False
            if parameter is None or not address:
                continue
            # Weights that were converted twice may lie at an old address in another format.
            if parameter.data_ptr() != address or parameter.dtype is not dtype:
                return False
        for hooks in self._empty:
            if hooks:
                return False
        for own in self._own:
            if "forward" in own:
                return False
        shared = adapter.__dict__.get("projections")
        return (adapter._modules["projections"] if shared is None else shared) is self._maps


class Recipe:
    """The launches of a step, valid while what they read and write lies where it lay.

    Args:
        memory: the state.
        weights: what the launches read beside it.
        room: what lies between the launches.
        launches: maps of the input, the state's step, maps of what it read, in this order.
        place: which of them is the state's.
        length: tokens of a row.
    """

    def __init__(
        self,
        memory: StreamMemory,
        weights: Weights,
        room: Tensor,
        launches: list[compile.Prepared],
        place: int,
        length: int,
    ) -> None:
        self.memory, self.tables, self.weights, self.room = memory, memory.tables(), weights, room
        self.before, self.own, self.after = (
            launches[:place],
            launches[place],
            launches[place + 1 :],
        )
        self.length = length
        self.first, self.last = launches[0].slots, launches[-1].slots

    def serves(self, adapter: RosaAdapter, memory: StreamMemory) -> bool:
        """Whether nothing has moved."""
        mine, now = self.tables, memory.tables()
        return (
            memory is self.memory
            and mine[0] is now[0]
            and mine[1] is now[1]
            and mine[2] is now[2]
            and mine[3] is now[3]
            and adapter.retrieve
            and self.weights.same(adapter)
        )

    def run(self, u: int, onto: int, out: int, mask: Tensor | None) -> None:
        """Launch with these addresses of input, of what is added to, and of the sum."""
        index = self.memory.device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self.run(u, onto, out, mask)
            return
        self.first[project.X] = u
        self.last[project.ONTO], self.last[project.Y] = onto, out
        stream = 0 if index is None else compile.stream_of(index)
        for launch in self.before:
            launch.queue(stream)
        self.memory.take(self.own, self.length, mask, stream)
        for launch in self.after:
            launch.queue(stream)


def _prepared(
    adapter: RosaAdapter,
    u: Tensor,
    onto: Tensor,
    states: RosaStates,
    state: DeviceState,
) -> Recipe | None:
    """The launches for tensors like these, or None where they do not exist."""
    batch, length, hidden = u.shape
    tokens, memory = batch * length, state.memory
    if not 0 < tokens <= TOKENS or length > STEPS or batch != memory.batch:
        return None
    narrow = adapter.v_proj.out_features != adapter.channels
    if not adapter.retrieve or adapter.own_value or narrow:
        return None
    held = Weights(adapter)
    if not held.same(adapter):
        return None
    weights = adapter.projections.plain(u.device)
    e0, e1, e_null = adapter.e0, adapter.e1, adapter.e_null
    if (
        weights is None
        or not {u.dtype, weights.dtype, onto.dtype, e0.dtype} <= FORMATS.keys()
        or u.shape != onto.shape
        or not (memory.device == onto.device == e0.device == u.device)
    ):
        return None
    parts, channels = len(weights.inward[0]), adapter.channels
    inner = weights.rank or 0
    # qkv [tokens, parts, C], y [tokens, C], down [tokens, parts, rank], back [tokens, rank]
    sizes = [_aligned(tokens * n) for n in (parts * channels, channels, parts * inner, inner)]
    room = states.room(sum(sizes), weights.dtype, u.device)
    width, start = room.element_size(), room.data_ptr()
    qkv, y, down, back = (start + width * sum(sizes[:i]) for i in range(4))

    kind = FORMATS[weights.dtype]
    first, within, last = (FORMATS[u.dtype], kind, kind), (kind,) * 3, (kind, kind)
    maps = functools.partial(project.prepare, tokens=tokens, index=memory.device.index)
    inward = [[w.data_ptr() for w in factor] for factor in weights.inward]
    outward = [[w.data_ptr()] for w in weights.outward]
    between = inner or channels
    target = down if inner else qkv
    launches = [maps(0, inward[0], target, inputs=hidden, outputs=between, formats=first)]
    if inner:
        up = maps(down, inward[1], qkv, inputs=inner, outputs=channels, apart=True, formats=within)
        launches.append(up)
    place = len(launches)
    q, k, v = (qkv + width * channels * part for part in (0, parts - 2, parts - 1))
    launches.append(
        memory.prepare(
            (q, k, v),
            (e0.data_ptr(), e1.data_ptr(), 0 if e_null is None else e_null.data_ptr()),
            y,
            length,
            stride=parts * channels,
            own=state.options.unmatched == "self",
            formats=(kind, FORMATS[e0.dtype]),
        )
    )
    read = y
    if inner:
        read = back
        launches.append(maps(y, outward[0], back, inputs=channels, outputs=inner, formats=within))
    summed = (*last, FORMATS[onto.dtype])
    launches.append(maps(read, outward[-1], 0, inputs=between, outputs=hidden, formats=summed))
    return Recipe(memory, held, room, launches, place, length)


def _aligned(numbers: int) -> int:
    """Room for so many numbers, so that what follows begins on a boundary of 16 bytes."""
    return -(-numbers // 8) * 8
