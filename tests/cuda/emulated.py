"""Builds the kernels for the CPU with the system compiler and calls them through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rosakit import cuda
from rosakit.cuda import credit as credit_launcher
from rosakit.cuda import matcher, project
from rosakit.cuda.stream import StreamMemory
from rosakit.ops.oracle import suffix_match_oracle

_HERE = Path(__file__).parent / "emulator"
_KERNELS = Path(cuda.__file__).parent / "kernels"
_BUILT = tempfile.TemporaryDirectory(prefix="rosakit-emulated-")


@functools.cache
def build(source: str, **macros: int) -> ctypes.CDLL:
    """A library of ``emulator/<source>.cpp`` under these macros; skips without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to emulate the GPU kernels with")
    name = "_".join([source, *(f"{key}{value}" for key, value in sorted(macros.items()))])
    target = Path(_BUILT.name) / f"{name}.so"
    subprocess.run(
        [
            compiler,
            *("-std=c++20", "-O1", "-fPIC", "-shared", f"-I{_HERE}", f"-I{_KERNELS}"),
            *(f"-D{key}={value}" for key, value in macros.items()),
            str(_HERE / f"{source}.cpp"),
            *("-o", str(target)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(target))


def _pointer(array: np.ndarray | torch.Tensor | int | None) -> ctypes.c_void_p:
    if array is None or isinstance(array, int):
        return ctypes.c_void_p(array or None)
    at = array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
    return ctypes.c_void_p(at)


def match(
    q: np.ndarray,
    k: np.ndarray,
    *,
    granularity: str = "token",
    successor: str = "available",
    flips: int = 0,
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: np.ndarray | None = None,
    min_depth: int = matcher.MIN_DEPTH,
    max_depth: int = matcher.MAX_DEPTH,
    shared: bool = True,
    narrow: bool = False,
    warp_search: int = 24,
    near: int = matcher.NEAR,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`rosakit.cuda.match` of symbols ``[B, R, T]``; not `shared`: everything in global memory,
    as wide symbols always are.

    `warp_search` and LARGE_RANGE are small, so that short streams reach the search by a whole
    thread block and the ranges that are kept apart.
    """
    if granularity == "run":
        library = build("runs", CF=flips, THREADS=64, MIN_BLOCKS=1, RANK_SHARED=int(shared))
    else:
        places = ("RANK_SHARED", "K_SHARED", "Q_SHARED", "ENTRIES_SHARED", "CHAINS_SHARED")
        shared = shared and q.dtype == np.uint8
        levels = (2, 2, 2, 1, 1) if shared else (0, 0, 0, 0, 0)
        library = build(
            "match",
            CF=flips,
            THREADS=64,
            MIN_BLOCKS=1,
            INDEX_BYTES=2 if shared else 4,
            NARROW_CHAINS=int(narrow and not shared),
            WIDE=0 if q.dtype == np.uint8 else q.dtype.itemsize,
            WARP_SEARCH=warp_search,
            LARGE_RANGE=9,
            **dict(zip(places, levels, strict=True)),
        )
    batch, routes, length = q.shape
    position = np.full(q.shape, 77777, dtype=np.int32)
    sizes = position.copy()
    flipped = np.full((*q.shape, flips), 77777, dtype=np.int32)
    shift = matcher.plan(length, flips, 232448).super_shift
    numbers: list[Any] = [batch * routes, routes, length]
    numbers += [0xFFFFFFFF if max_length is None else max_length, min_length, shift]
    numbers += [min_depth, max_depth]
    numbers += [] if granularity == "run" else [near]
    numbers.append(min(2, batch * routes))
    if granularity == "run":
        numbers.append(int(successor == "strict"))
    arrays = (q, k, segment_starts, position, sizes, flipped)
    library.emulate_match(*map(_pointer, arrays), *map(ctypes.c_uint32, numbers))
    return position, sizes, flipped


def launch_stream(
    name: str,
    tensors: list[torch.Tensor | int | None],
    before: list[int],
    after: list[int],
    capacity: int,
    streams: int,
    **macros: int,
) -> None:
    """`rosakit.cuda.stream.StreamMemory._launch` under emulation."""
    numbers = [streams, *before, capacity, *after]
    names = {
        "extend_streams": "emulate_extend",
        "step_streams": "emulate_step",
        "rebuild_runs": "emulate_rebuild",
    }
    function = getattr(build("stream", **macros), names[name])
    function(*map(_pointer, tensors), *map(ctypes.c_uint32, numbers))


def stream_memory(monkeypatch: pytest.MonkeyPatch, saturated: int = 65535) -> None:
    """Lets `StreamMemory` run on the CPU: kernels emulated, the oracle in the matcher's place.

    Args:
        saturated: where stored runs stop.
    """

    def launch(self, name, tensors, before, after, formats=(0, 0)):
        launch_stream(
            *(name, tensors, before, after, self.capacity, self.batch * self.routes),
            NIBBLES=int(self.bits <= 4),
            M=self.bits,
            SCALAR=formats[0],
            E_SCALAR=formats[1],
            SATURATED=saturated,
        )

    def by_oracle(q, k, *, max_length, min_length, segment_starts):
        rules = {"max_length": max_length, "min_length": min_length}
        return suffix_match_oracle(q, k, segment_starts=segment_starts, **rules)

    def prepared(self, name, numbers, formats):
        def queue(slots):
            # Pointers, then numbers with the capacity among them.
            parts = slots[:15], slots[15:18], slots[19:]
            launch(self, name, *map(list, parts), formats)

        return Prepared(numbers, queue)

    project_kernels(monkeypatch)  # which steps launch beside those of the state
    monkeypatch.setattr(StreamMemory, "_launch", launch)
    monkeypatch.setattr(StreamMemory, "_prepared", prepared)
    monkeypatch.setattr(matcher, "match", by_oracle)


class Prepared:
    """`rosakit.cuda.compile.Prepared` of an emulated kernel.

    Args:
        numbers: the arguments.
        queue: what launches with them.
    """

    def __init__(self, numbers: Sequence[int], queue: Callable[[list[int]], None]) -> None:
        self.slots = list(numbers)
        self._queue = queue

    def queue(self, stream: int) -> None:
        self._queue(self.slots)


def project_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `rosakit.cuda.project` run on the CPU."""

    def kernel(x: int, weight: int, y: int, index: int | None) -> types.SimpleNamespace:
        library = build("project", X_SCALAR=x, SCALAR=weight, Y_SCALAR=y)

        def prepare(grid: tuple[int, int, int], threads: int, numbers: Sequence[int]) -> Prepared:
            def queue(slots: list[int]) -> None:
                counts = map(ctypes.c_uint32, [*slots[6:], grid[2]])
                library.emulate_project(*map(_pointer, slots[:6]), *counts)

            return Prepared([int(number) for number in numbers], queue)

        return types.SimpleNamespace(prepare=prepare)

    monkeypatch.setattr(project, "_kernel", kernel)


_FORMATS = {torch.float32: 0, torch.bfloat16: 1}


def _library(x: torch.Tensor, bits: int, fixed: bool = False) -> ctypes.CDLL:
    kind = _FORMATS[x.dtype]
    return build("credit", M=bits, SCALAR=kind, E_SCALAR=kind, FIXED=int(fixed))


def pack(x: torch.Tensor, bits: int) -> torch.Tensor:
    batch, length, channels = x.shape
    symbols = torch.full((batch, channels // bits, length), 255, dtype=torch.uint8)
    _library(x, bits).emulate_pack(_pointer(x), _pointer(symbols), batch, length, channels // bits)
    return symbols


def retrieve(
    v: torch.Tensor,
    position: torch.Tensor,
    e0: torch.Tensor,
    e1: torch.Tensor,
    e_null: torch.Tensor | None,
    bits: int,
    unmatched: str,
) -> torch.Tensor:
    batch, length, channels = v.shape
    y = torch.full_like(v, float("nan"))
    _library(v, bits).emulate_retrieve(
        *map(_pointer, (v, position, e0, e1, e_null, y)),
        *(batch, length, channels // bits, credit_launcher.UNMATCHED[unmatched]),
    )
    return y


def credit(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e0: torch.Tensor,
    e1: torch.Tensor,
    position: torch.Tensor,
    flipped: torch.Tensor,
    *,
    bits: int,
    unmatched: str,
    key_credit: str,
    soft_values: bool,
    temperature: float,
    credit_from: torch.Tensor | None = None,
    fixed: bool = False,
    chunk: int = 5,
) -> tuple[torch.Tensor, ...]:
    """`rosakit.cuda.credit.counterfactual_backward`, in chunks of few routes."""
    batch, length, channels = v.shape
    dq, dk, dv = (torch.full_like(v, float("nan")) for _ in range(3))
    slices = -(-length // 64)
    partials = torch.zeros((batch * slices, 3, channels))
    scale = credit_launcher.fixed_point_scale(grad, e0, e1, bits) if fixed else None
    key_from = 2 if credit_from is not None else 1 if key_credit == "successor" else 0
    arrays = (grad, q, k, v, e0, e1, position, flipped, credit_from, dq, dk, dv, partials, scale)
    numbers = (batch, length, channels // bits, chunk, 64)
    options = (credit_launcher.UNMATCHED[unmatched], int(soft_values), key_from)
    _library(v, bits, fixed).emulate_credit(
        *map(_pointer, arrays), *numbers, *options, ctypes.c_float(temperature)
    )
    return dq, dk, dv, *partials.sum(0)
