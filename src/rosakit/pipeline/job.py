"""One submission of the pipeline: its buffers, its parts, and what each thread does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from rosakit import native
from rosakit.pipeline import transport, wire
from rosakit.types import Match


class Part(NamedTuple):
    """Streams ``[begin, end)`` of all ``B * R``, of one batch row."""

    row: int
    begin: int
    end: int


def parts_of(batch: int, routes: int, wanted: int) -> list[Part]:
    """At least `wanted` parts of about one size, where there are as many streams."""
    size = max(1, -(-batch * routes // wanted))
    return [
        Part(row, row * routes + first, row * routes + min(first + size, routes))
        for row in range(batch)
        for first in range(0, routes, size)
    ]


@dataclass
class Slot:
    """One set of buffers, and what was last copied out of it."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    busy: transport.Mark | None = None

    def take(self, name: str, size: int, allocate: Callable[[int], Tensor]) -> Tensor:
        """`size` bytes of the buffer `name`, kept for the next submission."""
        held = self.buffers.get(name)
        if held is None or held.numel() < size:
            held = self.buffers[name] = allocate(size)
        return held[:size]


class Job:
    """One submission on its way through the threads."""

    def __init__(
        self,
        road: transport.Transport,
        slot: Slot,
        sent: list[Tensor],
        by_row: dict[str, Tensor],
        match: Match,
        rules: dict[str, Any],
        packed: bool,
    ) -> None:
        self.road, self.slot, self.rules, self.packed = road, slot, rules, packed
        self.sent, self.by_row, self.match_tensors = sent, by_row, match
        self.error: BaseException | None = None
        self.mark: transport.Mark | None = None
        self.marks: list[tuple[Part, transport.Mark]] = []
        self.host: list[Tensor] = []
        self.host_by_row: dict[str, Tensor] = {}
        self.results: list[Tensor] = []

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        return self.slot.take(name, size, self.road.buffer).view(like.dtype).view(like.shape)

    def download(self, parts: list[Part]) -> None:
        """Queue the copies of all parts; what rows have travels with the first."""
        self.host = [self._buffer(f"sent{i}", x) for i, x in enumerate(self.sent)]
        for name, x in self.by_row.items():
            self.host_by_row[name] = self._buffer(name, x)
            self.road.download(self.host_by_row[name], x)
        names = ("position", "length", "flipped")
        self.results = [
            self._buffer(name, x)
            for name, x in zip(names, self.match_tensors, strict=True)
            if x is not None
        ]
        for part in parts:
            rows = slice(part.begin, part.end)
            for target, source in zip(self.host, self.sent, strict=True):
                mark = self.road.download(target[rows], source[rows])
            self.marks.append((part, mark))

    def landed(self) -> Iterator[tuple[Part, list[NDArray[Any]]]]:
        """Parts with q and k ``[1, r, T]``, as they arrive."""
        length = self.match_tensors.position.shape[1]
        for part, mark in self.marks:
            mark.synchronize()
            with record_function("rosakit::unpack"):
                arrays = [x[part.begin : part.end].numpy() for x in self.host]
                if self.packed:
                    arrays = [wire.unpack(x, length) for x in arrays]
            yield part, [x[None] for x in arrays]

    def match(self, part: Part, arrays: list[NDArray[Any]]) -> None:
        """Let the core match a part, and start the copy back."""
        if self.error is not None:
            return
        if self.slot.busy is not None:  # the copies of the submission before, out of these buffers
            self.slot.busy.synchronize()
            self.slot.busy = None
        rows = slice(part.begin, part.end)
        by_row = {n: x[part.row : part.row + 1].numpy() for n, x in self.host_by_row.items()}
        out = [x[rows][None].numpy() for x in self.results]
        with record_function("rosakit::match"):
            native.match_into(
                arrays[0],
                arrays[1],
                out[0],
                out[1],
                out[2] if len(out) > 2 else None,
                segment_starts=by_row.get("segment_starts"),
                flip_at=by_row.get("flip_at"),
                **self.rules,
            )
        targets = [x for x in self.match_tensors if x is not None]
        pairs = [(x[rows], y[rows]) for x, y in zip(targets, self.results, strict=True)]
        self.mark = self.road.upload(pairs)

    def fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
