"""The sweep over single-bit flips, run on the CPU."""

from __future__ import annotations

import ctypes

import torch

from rosakit.cuda import bitflip as launcher
from tests.cuda.emulated import build


def bitflip_credit(
    q,
    k,
    v,
    grad,
    e0,
    e1,
    e_null=None,
    *,
    tied=False,
    flip_values=False,
    unmatched_self=False,
    segment_starts=None,
    max_length=None,
    min_length=1,
    shared_limit=232448,
):
    """`rosakit.cuda.bitflip.bitflip_credit`; a small `shared_limit` leaves arrays in scratch."""
    batch, routes, length = q.shape
    bits = grad.shape[2] // routes
    plan = launcher.plan(length, bits, tied, shared_limit)
    wide = grad.dtype == torch.float64
    library = build(
        "bitflip", M=bits, TIED=int(tied), THREADS=64, WIDE=int(wide), PLACES=plan.places
    )
    credit_q, credit_k = torch.full_like(grad, float("nan")), torch.zeros_like(grad)
    levels = [None if e is None else e.double().contiguous() for e in (e0, e1, e_null)]
    arrays = (q, k, v, segment_starts, grad, *levels, credit_q, credit_k)
    numbers = [batch * routes, routes, length, max_length or 0xFFFFFFFF, min_length]
    numbers += [int(unmatched_self), int(flip_values), min(2, batch * routes)]
    library.emulate_bitflip(
        *(ctypes.c_void_p(None if a is None else a.data_ptr()) for a in arrays),
        ctypes.c_size_t(plan.shared_bytes),
        ctypes.c_size_t(plan.scratch_bytes),
        *map(ctypes.c_uint32, numbers),
    )
    return credit_q, credit_k
