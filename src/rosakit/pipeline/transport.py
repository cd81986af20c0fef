"""How symbols come down and results go up: through streams of a GPU, or plainly on the CPU.

Both have one face, so that the engine is one path. A transport belongs to one device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rosakit.errors import BackendError


class Mark(Protocol):
    """A point in the work of a device."""

    def synchronize(self) -> None:
        """Sleep until the device has come to it."""


class Transport(Protocol):
    """Copies between a device and buffers that the core reads and writes."""

    def buffer(self, size: int) -> Tensor:
        """Host memory of `size` bytes, uint8."""

    def begin(self, *tensors: Tensor) -> None:
        """What follows on the side streams comes after the caller's work on `tensors`."""

    def download(self, target: Tensor, source: Tensor) -> Mark:
        """Start copying to the host; the mark is passed when `target` holds the symbols."""

    def upload(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        """Start copying (target, source) pairs to the device."""

    def join(self, mark: Mark, tensors: list[Tensor]) -> None:
        """What the caller does next with `tensors` comes after `mark`, without a wait here."""

    def check(self) -> None:
        """Refuse where work cannot leave the device's stream."""


class _Done:
    def synchronize(self) -> None:
        pass


class HostTransport:
    """For CPU tensors: copies that are finished when they return."""

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def begin(self, *tensors: Tensor) -> None:
        pass

    def download(self, target: Tensor, source: Tensor) -> Mark:
        target.copy_(source)
        return _Done()

    def upload(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        for target, source in pairs:
            target.copy_(source)
        return _Done()

    def join(self, mark: Mark, tensors: list[Tensor]) -> None:
        pass

    def check(self) -> None:
        pass


class CudaTransport:
    """For one CUDA device: pinned buffers, a stream down, a stream up, events that sleep."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down, self.up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self, *tensors: Tensor) -> None:
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        for stream in (self.down, self.up):
            stream.wait_event(ready)
            for tensor in tensors:
                # Freed by the caller while a copy still uses it, its memory stays ours until then.
                tensor.record_stream(stream)

    def download(self, target: Tensor, source: Tensor) -> Mark:
        with torch.cuda.stream(self.down):
            target.copy_(source, non_blocking=True)
            return self._mark(self.down)

    def upload(self, pairs: list[tuple[Tensor, Tensor]]) -> Mark:
        with torch.cuda.stream(self.up):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._mark(self.up)

    def _mark(self, stream: torch.cuda.Stream) -> Mark:
        # blocking: a thread that waits for it sleeps instead of polling.
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def join(self, mark: Mark, tensors: list[Tensor]) -> None:
        assert isinstance(mark, torch.cuda.Event)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)

    def check(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise BackendError(
                "backend='pipeline' matches on the CPU and cannot be part of a CUDA graph; "
                "capture with backend='cuda', or leave the adapters out of the graph"
            )


def of(device: torch.device) -> Transport:
    """A new transport for the device.

    Raises:
        BackendError: neither CPU nor CUDA.
    """
    if device.type == "cpu":
        return HostTransport()
    if device.type == "cuda":
        return CudaTransport(device)
    raise BackendError(
        f"backend='pipeline' moves symbols between a CPU and a CUDA device, not {device.type}; "
        "use backend='cpu'"
    )
