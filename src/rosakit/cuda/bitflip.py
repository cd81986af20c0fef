"""Launching the sweep over all single-bit flips of every stream.

The plain form that it is tested against is
`rosakit.ops.estimators.bitflip_credit.credit_naive`; the CPU core gives the same numbers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from rosakit.cuda import compile

MAX_POSITIONS = 65535
"""Longest stream: a candidate's length and position share 32 bits."""

_UNLIMITED = 0xFFFFFFFF
_FIXED_BYTES = 8 * (2 + 8) + 16 + 5 * 32 * 4  # a row's values and the slots of reductions


@dataclass(frozen=True)
class Plan:
    """How one launch uses the GPU.

    Attributes:
        threads: threads a block.
        resident: blocks that share one multiprocessor.
        places: bit n: array n of the kernel is in shared memory.
        shared_bytes: dynamic shared memory a block.
        scratch_bytes: global scratch a block.
    """

    threads: int
    resident: int
    places: int
    shared_bytes: int
    scratch_bytes: int


def plan(length: int, bits: int, tied: bool, shared_limit: int) -> Plan:
    """Decide for streams of `length` symbols of `bits` bits.

    Args:
        shared_limit: bytes of shared memory that one block may use.
    """
    threads = next(
        (n for most, n in ((256, 128), (1024, 256), (2048, 512)) if length <= most), 1024
    )
    sides = 1 if tied else 2
    flips = length * bits
    groups = [  # in the order of the kernel, which is that of what shared memory gains
        [2 * length, 2 * length, 2 * length if tied else 0, length],
        *([4 * length] for _ in range(4)),
        [length] * (1 + sides),
        [4 * flips] * sides,
        [8 * flips] * sides,
    ]
    places, shared, scratch = 0, _FIXED_BYTES, 0
    for n, group in enumerate(groups):
        size = sum((array + 15) // 16 * 16 for array in group)
        if shared + size <= shared_limit:
            places |= 1 << n
            shared += size
        else:
            scratch += size
    # A multiprocessor of 228 KiB also keeps 1 KiB a block for itself.
    resident = max(1, min(2048 // threads, (shared_limit + 1024) // (shared + 1024)))
    return Plan(threads, resident, places, shared, scratch)


def supports(q: Tensor, bits: int) -> bool:
    """Whether the kernel takes symbols ``[B, R, T]`` like these."""
    return q.is_cuda and q.dtype == torch.uint8 and 1 <= bits <= 8 and q.shape[-1] <= MAX_POSITIONS


def bitflip_credit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    e0: Tensor,
    e1: Tensor,
    e_null: Tensor | None,
    *,
    tied: bool = False,
    flip_values: bool = False,
    unmatched_self: bool = False,
    segment_starts: Tensor | None = None,
    max_length: int | None = None,
    min_length: int = 1,
) -> tuple[Tensor, Tensor]:
    """``<grad, y(one bit flipped) - y>`` for every bit of q and k, on the current stream.

    No copy to the host and no synchronisation; scratch is a few MB at most.

    Args:
        q, k, v: uint8 symbols ``[B, R, T]`` on one CUDA device.
        grad: float32 or float64 ``[B, T, C]``, the loss's slope in y.
        e0, e1, e_null: ``[C]``; no `e_null` means that a null reads zeros.
        tied: q and k are one stream (`q`), whose flips show in both.
        flip_values: v is that stream too.
        unmatched_self: a null reads its own position's value.
        segment_starts: int32 ``[B, T]`` or None.

    Returns:
        Credit of q and of k, ``[B, T, C]`` in the dtype of `grad`, summed in float64; with `tied`
        the joint credit and zeros.

    Raises:
        BackendError: the kernel cannot be compiled or launched.
    """
    batch, routes, length = q.shape
    bits = grad.shape[2] // routes
    credit_q, credit_k = torch.empty_like(grad), torch.zeros_like(grad)
    if not grad.numel():
        return credit_q, credit_k
    grad = grad.contiguous()
    levels = [None if e is None else e.detach().double().contiguous() for e in (e0, e1, e_null)]
    symbols = [x.contiguous() for x in (q, k, v)]
    starts = None if segment_starts is None else segment_starts.contiguous()
    with torch.cuda.device(grad.device):
        properties = torch.cuda.get_device_properties(grad.device)
        # torch's stubs lack the field.
        limit: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        chosen = plan(length, bits, tied, limit)
        macros = {
            "M": bits,
            "TIED": int(tied),
            "THREADS": chosen.threads,
            "WIDE": int(grad.dtype == torch.float64),
            "PLACES": chosen.places,
        }
        kernel = compile.load(("bitflip.cu",), ("bitflip",), macros, grad.device)["bitflip"]
        grid = min(batch * routes, properties.multi_processor_count * chosen.resident)
        scratch = torch.empty(
            grid * chosen.scratch_bytes + 16, dtype=torch.uint8, device=grad.device
        )
        numbers = [batch * routes, routes, length, max_length or _UNLIMITED, min_length]
        numbers += [int(unmatched_self), int(flip_values)]
        kernel.launch(
            (grid, 1, 1),
            chosen.threads,
            chosen.shared_bytes,
            [
                *(compile.pointer(x) for x in (*symbols, starts, grad, *levels)),
                *(compile.pointer(x) for x in (credit_q, credit_k, scratch)),
                (chosen.scratch_bytes, ctypes.c_size_t),
                *(compile.unsigned(n) for n in numbers),
            ],
        )
    return credit_q, credit_k
