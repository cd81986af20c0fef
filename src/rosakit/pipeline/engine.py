"""`Pipeline`: a bounded queue of matches that the C++ core works off beside the GPU.

The way of one submission: the caller's stream packs the symbols; a copy stream brings them into
pinned memory, part by part; a staging thread sleeps until a part has landed and unpacks it; a
matching thread hands it to the core, whose threads share the streams of the part, and starts the
copy back. The next part is copied and unpacked meanwhile. `Ticket.result` lets the caller's stream
wait for the last copy. A submission holds one of `depth` sets of buffers until its copies back are
queued; with none free, `submit` sleeps.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from rosakit import native
from rosakit.errors import BackendError, InvalidInputError, InvalidTypeError
from rosakit.pipeline import transport, wire
from rosakit.pipeline.job import Job, Part, Slot, parts_of
from rosakit.types import Match

_DTYPES = (torch.uint8, torch.uint16, torch.int32)


class Ticket:
    """A match that is under way."""

    def __init__(self, road: transport.Transport, match: Match, shape: tuple[int, ...]) -> None:
        self._road, self._match, self._shape = road, match, shape
        self._done: Future[transport.Mark] = Future()

    def done(self) -> bool:
        """Whether the match is found (its copy back may still run)."""
        return self._done.done()

    def result(self) -> Match:
        """The match, on the device of the symbols; int32, as `rosakit.ops.suffix_match`.

        Sleeps until the core is done; the copies back are waited for by the current stream only.

        Raises:
            Exception: whatever went wrong in the pipeline's threads.
        """
        with record_function("rosakit::join"):
            mark = self._done.result()
        tensors = [x for x in self._match if x is not None]
        self._road.join(mark, tensors)
        found = (x.reshape(*self._shape, *x.shape[2:]) for x in tensors)
        position, length = next(found), next(found)
        return Match(position, length, next(found, None))


class Pipeline:
    """Matches streams of one device on the CPU, asynchronously.

    Args:
        device: where the symbols live: a CUDA device, or "cpu" (the same path, with plain copies).
        depth: submissions under way at a time; 2 is double buffering.
        parts: pieces of a submission that are copied and matched one after another.

    Raises:
        BackendError: the device is neither; the compiled core is missing.
    """

    def __init__(self, device: torch.device | str, *, depth: int = 2, parts: int = 8) -> None:
        if depth < 1 or parts < 1:
            raise InvalidInputError(f"depth and parts must be at least 1, got {depth} and {parts}")
        if not native.available():
            raise BackendError(
                "backend='pipeline' needs the compiled core, which is missing; reinstall rosakit "
                "with a C++ compiler (pip install --force-reinstall rosakit)"
            )
        self.device, self.parts = torch.device(device), parts
        self._road = transport.of(self.device)
        self._free = [Slot() for _ in range(depth)]
        self._room = threading.Condition()
        self._staging = ThreadPoolExecutor(1, thread_name_prefix="rosakit-stage")
        self._matching = ThreadPoolExecutor(1, thread_name_prefix="rosakit-match")

    def submit(
        self,
        q: Tensor,
        k: Tensor,
        *,
        bits: int | None = None,
        granularity: str = "token",
        successor: str = "available",
        max_length: int | None = None,
        min_length: int = 1,
        segment_starts: Tensor | None = None,
        counterfactual_bits: int = 0,
        flip_at: Tensor | None = None,
    ) -> Ticket:
        """Start matching; returns before the symbols have left the device.

        Args:
            q, k: symbols ``[B, R, T]``, uint8, uint16 or int32, on the pipeline's device.
            bits: bits a symbol has; up to 4 they travel two a byte. None for all of the dtype's.
            granularity, successor, max_length, min_length: as `rosakit.ops.suffix_match`.
            segment_starts: int32 ``[B, T]``, or None.
            counterfactual_bits: M > 0 also flips each of the low M bits.
            flip_at: bool ``[B, T]``, where that is done; see `rosakit.ops.suffix_match`.

        Raises:
            InvalidTypeError, InvalidInputError: symbols or segments that do not fit.
            BackendError: the current stream is being captured into a CUDA graph.
        """
        self._check(q, k, segment_starts)
        self._road.check()
        batch, routes, length = q.shape
        streams = batch * routes
        width = 8 * q.element_size() if bits is None else bits
        rules = {
            "granularity": granularity,
            "successor": successor,
            "max_length": max_length,
            "min_length": min_length,
        }

        def empty(*more: int) -> Tensor:
            shape = (streams, length, *more)
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        match = Match(empty(), empty(), empty(counterfactual_bits) if counterfactual_bits else None)
        ticket = Ticket(self._road, match, tuple(q.shape))
        if q.numel() == 0:
            nothing = self._road.upload([])
            ticket._done.set_result(nothing)
            return ticket
        slot = self._acquire()
        try:
            with record_function("rosakit::submit"):
                sent = [wire.pack(x.reshape(streams, length), width) for x in (q, k)]
                by_row = {}
                if segment_starts is not None:
                    by_row["segment_starts"] = segment_starts.contiguous()
                if flip_at is not None:
                    by_row["flip_at"] = flip_at.to(torch.uint8)
                self._road.begin(*sent, *by_row.values(), *(x for x in match if x is not None))
                packed = wire.travels_packed(q, width)
                job = Job(self._road, slot, sent, by_row, match, rules, packed)
                job.download(parts_of(batch, routes, self.parts))
        except BaseException:
            self._release(slot)
            raise
        self._staging.submit(self._stage, job, ticket._done)
        return ticket

    def _check(self, q: Tensor, k: Tensor, starts: Tensor | None) -> None:
        if q.dim() != 3 or q.shape != k.shape:
            raise InvalidInputError(
                f"q and k must have one shape [B, R, T], got {list(q.shape)} and {list(k.shape)}"
            )
        if q.dtype not in _DTYPES or k.dtype != q.dtype:
            raise InvalidTypeError(
                f"q and k must both be uint8, uint16 or int32 symbols, got {q.dtype} and {k.dtype}"
            )
        for name, x in (("q", q), ("k", k), ("segment_starts", starts)):
            if x is not None and x.device != self._placed():
                raise InvalidInputError(
                    f"{name} is on {x.device}; this pipeline serves {self.device}"
                )
        expected = [q.shape[0], q.shape[2]]
        if starts is not None and (list(starts.shape) != expected or starts.dtype != torch.int32):
            raise InvalidInputError(
                f"segment_starts must be int32 [B, T] = {expected}, got {starts.dtype} "
                f"{list(starts.shape)}"
            )

    def _placed(self) -> torch.device:
        if self.device.type == "cuda" and self.device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return self.device

    # --- the threads ---------------------------------------------------------------------------

    def _stage(self, job: Job, done: Future[transport.Mark]) -> None:
        """Unpack every part as it lands, and pass it on."""
        try:
            for part, arrays in job.landed():
                self._matching.submit(self._match, job, part, arrays)
        except BaseException as error:  # carried to whoever asks for the result
            job.fail(error)
        self._matching.submit(self._finish, job, done)

    def _match(self, job: Job, part: Part, arrays: list[NDArray[Any]]) -> None:
        try:
            job.match(part, arrays)
        except BaseException as error:
            job.fail(error)

    def _finish(self, job: Job, done: Future[transport.Mark]) -> None:
        job.slot.busy = job.mark
        self._release(job.slot)
        if job.error is not None:
            done.set_exception(job.error)
        else:
            assert job.mark is not None
            done.set_result(job.mark)

    def _acquire(self) -> Slot:
        with self._room:
            self._room.wait_for(lambda: self._free)
            return self._free.pop()

    def _release(self, slot: Slot) -> None:
        with self._room:
            self._free.append(slot)
            self._room.notify()

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self._staging.shutdown()
        self._matching.shutdown()


_pipelines: dict[tuple[int, str], Pipeline] = {}
_lock = threading.Lock()


def shared(device: torch.device) -> Pipeline:
    """The pipeline of a device that all adapters use (one a process, also after a fork)."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (os.getpid(), str(device))
    with _lock:
        if key not in _pipelines:
            _pipelines[key] = Pipeline(device)
        return _pipelines[key]
