"""`DeviceState`: one adapter's streaming state in GPU memory, and when it is chosen.

A step never leaves the device, at the price of device memory that grows with the context:
`rosakit.cuda.stream.bytes_a_symbol` a route and position, 3.5 bytes up to four bits a route. So
``backend="auto"`` keeps a model's states there while they are a small part of what an ordinary
cache would hold, or small in themselves (`auto_positions`); ``"cuda"`` keeps them there, ``"cpu"``
never.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rosakit import cuda, symbols
from rosakit.cuda import matcher
from rosakit.cuda.stream import StreamMemory, bytes_a_symbol
from rosakit.layers.graphs import outside_graphs
from rosakit.ops.retrieve import gpu_kernels, values_of_bits
from rosakit.ops.rows import channel_mask
from rosakit.types import Match

if TYPE_CHECKING:
    from rosakit.layers.adapter import RosaAdapter

AUTO_SHARE = 0.125
"""Share of an ordinary cache's keys and values that "auto" lets the states of all adapters of a
model take: with growth's slack and a window they stay below 15% of it at long contexts."""

AUTO_BYTES = 2 << 30
"""Bytes that "auto" lets the states of all adapters and rows of a model take, whatever their share:
a state on the host costs every layer a wait in every step."""

_OPTIONS = (
    *("address", "bits", "routes", "unmatched", "granularity", "successor"),
    *("max_length", "min_length"),
)


def positions_on_device(adapter: RosaAdapter, batch: int) -> int | None:
    """How many positions the adapter's state of so many rows may hold on its device.

    Returns:
        0 for none, None for any number.
    """
    fits = adapter.bits <= 8 and adapter.granularity == "token" and adapter.address == "learned"
    on_gpu = adapter.e0.is_cuda and cuda.available()
    if not fits or not on_gpu or adapter.backend not in ("auto", "cuda"):
        return 0
    if adapter.backend == "cuda":
        return None
    return auto_positions(
        adapter.routes, adapter.bits, batch, adapter.peers, adapter.ordinary_bytes
    )


def auto_positions(
    routes: int, bits: int, batch: int, adapters: int, ordinary_bytes: float | None
) -> int:
    """How many positions of a row "auto" keeps on the device: see `AUTO_SHARE` and `AUTO_BYTES`.

    Args:
        routes, bits: of an adapter.
        batch: rows.
        adapters: of the model.
        ordinary_bytes: of keys and values that an ordinary cache of the whole model holds for a
            position of a row; None where that is not known.
    """
    own = adapters * routes * bytes_a_symbol(bits)
    if ordinary_bytes is not None and own <= AUTO_SHARE * ordinary_bytes:
        return matcher.MAX_POSITIONS
    return min(matcher.MAX_POSITIONS, int(AUTO_BYTES / (own * batch)))


class Recipes(dict[Any, Any]):
    """The prepared steps of a state (see `rosakit.layers.step`), by what they are made for.

    A copy of the state makes its own: they hold addresses.
    """

    def __reduce__(self) -> tuple[type[Recipes], tuple[()]]:
        return Recipes, ()


class DeviceState:
    """What one adapter remembers, on a GPU; the same numbers as `AdapterState`.

    Args:
        adapter: the adapter whose options the state follows.
        batch: number of rows.
    """

    def __init__(self, adapter: RosaAdapter, batch: int) -> None:
        # Not the module: a cache is copied without the model.
        self.options = SimpleNamespace(**{name: getattr(adapter, name) for name in _OPTIONS})
        device = adapter.e0.device
        self.memory = StreamMemory(
            batch,
            adapter.routes,
            bits=adapter.bits,
            max_length=adapter.max_length,
            min_length=adapter.min_length,
            device=device,
        )
        self.bound: tuple[str, int | None] = ("", 0)
        """The backend for which so many positions may lie here (None: any number)."""
        self.recipes = Recipes()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return self.memory.nbytes

    @property
    def length(self) -> int:
        """Positions held, of the longest row at most."""
        return self.memory.most

    @outside_graphs
    def extend(
        self,
        channels: list[Tensor],
        match: Match | None,
        mask: Tensor | None,
        e0: Tensor,
        e1: Tensor,
        e_null: Tensor | None,
        *,
        wants_match: bool = True,
    ) -> tuple[Tensor, Match | None]:
        """As `AdapterState.extend`; the match is on the device, and may be left out."""
        assert match is None
        bits, v = self.options.bits, channels[-1]
        own = self.options.unmatched == "self"
        if self.memory.fits(channels, e0) and not (torch.is_grad_enabled() and v.requires_grad):
            q, k, v = channels
            return self.memory.read(q, k, v, e0, e1, e_null, mask=mask, own=own, match=wants_match)
        kernels = gpu_kernels(v, v, bits)
        pack = symbols.pack if kernels is None else kernels.pack
        q, k, value = (pack(x, bits) for x in channels)
        read, found = self.memory.read_whole(q, k, value, mask=mask, own=own)
        if own:
            matched = torch.ones_like(v, dtype=torch.bool)
        else:
            matched = channel_mask(found.position, bits)
        return values_of_bits(symbols.unpack(read, bits), matched, e0, e1, e_null, v.dtype), found

    def admits(self, adapter: RosaAdapter, more: int) -> bool:
        """Whether `more` positions may be added here, as far as the limit was known last."""
        backend, limit = self.bound
        return adapter.backend == backend and (limit is None or self.memory.most + more <= limit)

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order (beam search)."""
        if self.bound[1] is not None and len(rows) != self.memory.batch:
            self.bound = ("", 0)  # so many rows have another limit: the next chunk asks for it
        self.memory = self.memory.index_select(rows)
        self.recipes.clear()

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths ``[B]``."""
        self.memory.truncate(lengths)

    def history(self) -> tuple[list[Tensor], Tensor]:
        """What moving to the host starts from.

        Returns:
            Queries, keys and values ``[B, R, n]``, and which are real ``[B, n]``, on the host.
        """
        lengths = self.memory.lengths.cpu()
        longest = int(lengths.max()) if len(lengths) else 0
        real = torch.arange(longest) < lengths[:, None]
        return [x[..., :longest].contiguous().cpu() for x in self.memory.history()], real
