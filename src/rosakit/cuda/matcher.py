"""Launching the exact GPU matcher: what fits where, and one kernel for all routes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from rosakit.cuda import compile
from rosakit.errors import InvalidInputError, InvalidTypeError

_SOURCES = ("rank.cuh", "chains.cuh", "level.cuh", "levels.cuh", "walk.cuh", "match.cu")
_UNLIMITED = 0xFFFFFFFF
_SUPERBLOCKS = 128  # as in rank.cuh
_CONTROL_BYTES = 384
SYMBOL_DTYPES = (torch.uint8, torch.uint16, torch.int32)
MAX_POSITIONS = 1 << 19
"""Longest stream: its alive bits and the bases of its ranks have to fit into shared memory."""

# Levels that every stream gets, and the most before the walk takes over (see docs/decisions).
MIN_DEPTH = 3
MAX_DEPTH = 32
# Candidates a position, on average, below which single threads finish what is left of a route.
NEAR = 3


@dataclass(frozen=True)
class Plan:
    """How one launch uses the GPU.

    Attributes:
        threads: threads a block.
        resident: blocks that share one multiprocessor.
        index_bytes: bytes of an entry.
        places: for each structure how much of it is in shared memory (macros of the kernel).
        shared_bytes: dynamic shared memory a block.
        scratch_bytes: global scratch a block.
        super_shift: log2 of the blocks of 64 entries in a superblock.
    """

    threads: int
    resident: int
    index_bytes: int
    places: tuple[tuple[str, int], ...]
    shared_bytes: int
    scratch_bytes: int
    super_shift: int


def plan(length: int, flips: int, shared_limit: int) -> Plan:
    """Decide for streams of `length` with `flips` counterfactual bits.

    Args:
        shared_limit: bytes of shared memory that one block may use.
    """
    blocks = (length + 63) // 64
    threads = 1024 if length > 8192 else 512 if length > 2048 else 256
    index_bytes = 2 if length <= 65536 else 4
    entries = 2 * _round(blocks * 64 * index_bytes)
    narrow = index_bytes == 4 and length <= 131072
    chains = _round(length * (4 if index_bytes == 2 or narrow else 8))
    symbols = _round((length + 1) // 2 + 16)
    ranks = blocks * 64
    fixed = _CONTROL_BYTES + 2 * _SUPERBLOCKS * 64 + _round((length // 32 + 2) * 4)
    two_digits = flips > 4
    # In the order of what shared memory gains: random reads first, streams last. Each step names
    # the macro, its value then, and the bytes that it adds.
    steps = [("RANK_SHARED", 1, ranks)]
    if two_digits:
        steps += [("RANK_SHARED", 2, ranks)]
    steps += [("K_SHARED", 1, symbols)]
    if two_digits:
        steps += [("K_SHARED", 2, symbols)]
    steps += [
        ("ENTRIES_SHARED", 1, entries),
        ("Q_SHARED", 1, symbols),
        ("CHAINS_SHARED", 1, chains),
    ]
    # Room for a second digit that one-digit symbols do not use must not cost a resident block.
    extras = [("RANK_SHARED", 2, ranks), ("K_SHARED", 2, symbols), ("Q_SHARED", 2, symbols)]
    modest = (shared_limit + 1024) // (1024 // threads) - 1024
    places = dict.fromkeys(
        ("RANK_SHARED", "K_SHARED", "Q_SHARED", "ENTRIES_SHARED", "CHAINS_SHARED"), 0
    )
    shared = fixed
    for room, wanted in ((shared_limit, steps), (modest, extras)):
        for name, value, size in wanted:
            if places[name] == value - 1 and shared + size <= room:
                places[name] = value
                shared += size
    scratch = _round(length * 4) if narrow else 0  # the ends of ranges too large for 15 bits
    for name, size in (("ENTRIES_SHARED", entries), ("CHAINS_SHARED", chains)):
        scratch += 0 if places[name] else size
    for name, size in (("RANK_SHARED", ranks), ("K_SHARED", symbols), ("Q_SHARED", symbols)):
        scratch += (0 if places[name] else size) + (0 if places[name] == 2 else 2 * size)
    places["NARROW_CHAINS"] = int(narrow)
    # A multiprocessor of 228 KiB also keeps 1 KiB a block for itself.
    resident = max(1, min(1024 // threads, (shared_limit + 1024) // (shared + 1024)))
    return Plan(
        threads,
        resident,
        index_bytes,
        tuple(sorted(places.items())),
        shared,
        scratch,
        _super_shift(blocks),
    )


def runs_plan(length: int, shared_limit: int) -> Plan:
    """As `plan`, for run granularity: the rank structures in shared memory, if they fit."""
    blocks = (length + 63) // 64
    threads = 1024 if length > 8192 else 512 if length > 2048 else 256
    fixed = 2 * _CONTROL_BYTES + 2 * _SUPERBLOCKS * 64
    ranks = 2 * blocks * 64
    in_shared = fixed + ranks <= shared_limit
    shared = fixed + (ranks if in_shared else 0)
    words = _round((length // 32 + 2) * 4)
    scratch = 5 * words + 2 * _round(length + 32) + 2 * _round(length * 4) + 2 * blocks * 256
    scratch += _round(length * 8) + (0 if in_shared else ranks)
    resident = max(1, min(1024 // threads, (shared_limit + 1024) // (shared + 1024)))
    places = (("RANK_SHARED", int(in_shared)),)
    return Plan(threads, resident, 4, places, shared, scratch, _super_shift(blocks))


def wide_plan(length: int, symbol_bytes: int) -> Plan:
    """As `plan`, for uint16 and int32 symbols: everything but the bases in global memory."""
    blocks = (length + 63) // 64
    threads = 1024 if length > 8192 else 512 if length > 2048 else 256
    digits = 4 if symbol_bytes == 2 else 8
    shared = _CONTROL_BYTES + digits * _SUPERBLOCKS * 64 + _round((length // 32 + 2) * 4)
    scratch = 2 * _round(length * 4 + 16) + digits * blocks * 64 + 2 * blocks * 256
    scratch += _round(length * 8)
    places = dict.fromkeys(
        ("RANK_SHARED", "K_SHARED", "Q_SHARED", "ENTRIES_SHARED", "CHAINS_SHARED"), 0
    )
    places["NARROW_CHAINS"] = 0
    return Plan(threads, 1, 4, tuple(sorted(places.items())), shared, scratch, _super_shift(blocks))


def _super_shift(blocks: int) -> int:
    shift = 0
    while ((blocks - 1) >> shift) + 1 > _SUPERBLOCKS:
        shift += 1
    return shift


def _round(size: int) -> int:
    return (size + 15) // 16 * 16


def match(
    q: Tensor,
    k: Tensor,
    *,
    granularity: str = "token",
    successor: str = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Tensor | None = None,
    counterfactual_bits: int = 0,
    min_depth: int = MIN_DEPTH,
    max_depth: int = MAX_DEPTH,
    near: int = NEAR,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact suffix match on the GPU; see `rosakit.cuda.match`.

    Args:
        min_depth, max_depth: levels before the walk, for tests and tuning; results do not depend
            on them.
        near: candidates a position at which the levels stop; as little.
    """
    batch, routes, length = q.shape
    position = torch.empty((batch, routes, length), dtype=torch.int32, device=q.device)
    sizes = torch.empty_like(position)
    flipped = torch.empty(
        (batch, routes, length, counterfactual_bits), dtype=torch.int32, device=q.device
    )
    numbers = [
        _UNLIMITED if max_length is None else max_length,
        min_length,
        min_depth,
        max_depth,
    ]
    numbers.append(int(successor == "strict") if granularity == "run" else near)
    if position.numel():
        with torch.cuda.device(q.device):
            _launch(q, k, segment_starts, (position, sizes, flipped), granularity, numbers)
    return position, sizes, flipped if counterfactual_bits else None


def _launch(
    q: Tensor,
    k: Tensor,
    segment_starts: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
    granularity: str,
    numbers: list[int],
) -> None:
    batch, routes, length = q.shape
    flips = out[2].shape[-1]
    properties = torch.cuda.get_device_properties(q.device)
    # torch's stubs lack the field.
    shared_limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    sources: tuple[str, ...]
    wide = 0 if q.dtype == torch.uint8 else q.element_size()
    if granularity == "run":
        chosen = runs_plan(length, shared_limit)
        sources, name = ("rank.cuh", "runs.cu"), "suffix_match_runs"
    else:
        chosen = wide_plan(length, wide) if wide else plan(length, flips, shared_limit)
        sources, name = _SOURCES, "suffix_match"
    macros = {
        "CF": flips,
        "THREADS": chosen.threads,
        "MIN_BLOCKS": 1024 // chosen.threads,
        **dict(chosen.places),
    }
    if granularity == "token":
        macros["INDEX_BYTES"] = chosen.index_bytes
        macros["WIDE"] = wide
    kernel = compile.load(sources, (name,), macros, q.device)[name]
    grid = min(batch * routes, properties.multi_processor_count * chosen.resident)
    scratch = torch.empty(grid * chosen.scratch_bytes + 16, dtype=torch.uint8, device=q.device)
    maximum, minimum, *rest = numbers
    kernel.launch(
        (grid, 1, 1),
        chosen.threads,
        chosen.shared_bytes,
        [
            *(compile.pointer(tensor) for tensor in (q, k, segment_starts, *out, scratch)),
            (chosen.scratch_bytes, ctypes.c_size_t),
            *(compile.unsigned(n) for n in (batch * routes, routes, length, maximum, minimum)),
            *(compile.unsigned(n) for n in (chosen.super_shift, *rest)),
        ],
    )


def check(
    q: Tensor,
    k: Tensor,
    segment_starts: Tensor | None,
    counterfactual_bits: int,
    granularity: str = "token",
) -> None:
    """Refuse what the kernels cannot take."""
    if q.dim() != 3 or q.shape != k.shape:
        raise InvalidInputError(
            f"q and k must have one shape [B, R, T], got {list(q.shape)} and {list(k.shape)}"
        )
    if q.dtype not in SYMBOL_DTYPES or k.dtype != q.dtype:
        raise InvalidTypeError(
            f"the GPU matcher takes uint8, uint16 or int32 symbols, got {q.dtype} and {k.dtype}"
        )
    if granularity == "run" and q.dtype != torch.uint8:
        raise InvalidTypeError(
            f"the GPU matcher takes uint8 symbols at run granularity, got {q.dtype}; "
            "use backend='cpu' for wider ones"
        )
    if not q.is_cuda or q.device != k.device:
        raise InvalidInputError(f"q and k must be on one CUDA device, got {q.device}, {k.device}")
    if q.shape[2] > MAX_POSITIONS:
        raise InvalidInputError(
            f"the GPU matcher takes up to {MAX_POSITIONS} positions, got {q.shape[2]}; "
            "use backend='cpu'"
        )
    most = 8 if q.dtype == torch.uint8 else 16
    if not 0 <= counterfactual_bits <= most:
        raise InvalidInputError(
            f"counterfactual_bits must be in 0..{most} for {q.dtype}, got {counterfactual_bits}"
        )
    if segment_starts is not None and (
        segment_starts.dtype != torch.int32
        or list(segment_starts.shape) != [q.shape[0], q.shape[2]]
        or segment_starts.device != q.device
    ):
        raise InvalidInputError(
            f"segment_starts must be int32 [B, T] = {[q.shape[0], q.shape[2]]} on {q.device}, got "
            f"{segment_starts.dtype} {list(segment_starts.shape)} on {segment_starts.device}"
        )
