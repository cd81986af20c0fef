"""Matching ahead of reading: `begin` starts a match on the CPU, `rosa(..., given=...)` reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosakit import pipeline, symbols
from rosakit.errors import BackendError, InvalidInputError
from rosakit.ops.estimators.sampling import check_stride, sample_positions, sampled_mask
from rosakit.ops.match import check_options
from rosakit.ops.retrieve import gpu_kernels
from rosakit.pipeline import Ticket
from rosakit.types import Granularity, Match, Successor


class Ahead(NamedTuple):
    """A match under way, and what it is a match of.

    Attributes:
        ticket: the pipeline's promise.
        credit: whether flipped queries are matched too, for the counterfactual gradients.
    """

    ticket: Ticket
    credit: bool

    def result(self) -> Match:
        """The match; see `rosakit.pipeline.Ticket.result`."""
        return self.ticket.result()


def begin(
    q: Tensor,
    k: Tensor,
    *,
    bits: int,
    granularity: Granularity = "token",
    successor: Successor = "available",
    max_length: int | None = None,
    min_length: int = 1,
    segment_starts: Tensor | None = None,
    credit: bool | None = None,
    stride: int = 1,
    seed: int = 0,
) -> Ahead:
    """Start matching the symbols of real-valued channels on the CPU, and return at once.

    What the caller puts on the device between this and ``rosa(..., given=...)`` runs beside the
    match. The streams' symbols leave the device packed, the positions come back into its memory;
    no thread polls.

    Args:
        q: queries ``[B, T, C]``, floating point.
        k: keys, same shape and device.
        bits: bits per route, 1..16.
        granularity: "token" or "run".
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long.
        min_length: a shorter best match is no match.
        segment_starts: int32 ``[B, T]`` on the same device, or None.
        credit: whether to match flipped queries too; None for where `q` or `k` wants a gradient.
        stride, seed: of the estimator, whose sample of flips is found.

    Raises:
        InvalidInputError: shapes or options that do not fit.
        BackendError: no compiled core; another kind of device; capture into a CUDA graph;
            inside `torch.compile`.
    """
    if torch.compiler.is_compiling():
        raise BackendError(
            "backend='pipeline' runs threads beside the model and cannot be compiled into a graph; "
            "compile with backend='auto', or leave the adapters out of torch.compile"
        )
    check_options(granularity, successor, max_length, min_length, bits, "pipeline")
    if q.shape != k.shape or q.dim() != 3:
        raise InvalidInputError(
            f"q and k must have one shape [B, T, C], got {list(q.shape)} and {list(k.shape)}"
        )
    if credit is None:
        credit = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    check_stride(stride)
    with torch.no_grad():
        flip_at = None
        if credit and stride > 1:
            flip_at = sampled_mask(sample_positions(q, stride, seed), q.shape[1])
        kernels = gpu_kernels(q, q, bits)
        pack = symbols.pack if kernels is None else kernels.pack
        ticket = pipeline.shared(q.device).submit(
            pack(q, bits),
            pack(k, bits),
            bits=bits,
            granularity=granularity,
            successor=successor,
            max_length=max_length,
            min_length=min_length,
            segment_starts=segment_starts,
            counterfactual_bits=bits if credit else 0,
            flip_at=flip_at,
        )
    return Ahead(ticket, credit)


def finish(ahead: Ahead) -> Match:
    """The match of `begin`, joined by the current stream."""
    return ahead.result()
