"""`suffix_match`: the exact suffix match as a torch operator, whichever backend computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rosakit import cuda, native, pipeline
from rosakit.errors import BackendError, InvalidInputError, InvalidTypeError, warn_once
from rosakit.ops import segments
from rosakit.ops.oracle import suffix_match_oracle
from rosakit.types import Backend, Granularity, Match, Successor

SYMBOL_DTYPES = (torch.uint8, torch.uint16, torch.int32)
_UNLIMITED = 0  # how `max_length=None` travels through the operator's schema


def suffix_match(
    q: Tensor,
    k: Tensor,
    *,
    granularity: Granularity = "token",
    successor: Successor = "available",
    max_length: int | None = None,
    min_length: int = 1,
    attention_mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    segment_starts: Tensor | None = None,
    counterfactual_bits: int = 0,
    counterfactual_at: Tensor | None = None,
    backend: Backend = "auto",
) -> Match:
    """For every position the longest earlier occurrence of the query's current suffix.

    ``match(i)`` is the ``j < i`` whose key suffix agrees with the query suffix at ``i`` over the
    most symbols, the latest such ``j`` on ties; ``position = j + 1`` is the successor that
    retrieval reads. See ``docs/concepts.md`` for a picture, and semantics section 2 for the
    definition, including ``granularity="run"``.

    Args:
        q: query symbols ``[B, R, T]`` (also ``[R, T]`` and ``[T]``); uint8, uint16 or int32.
            Token ids in int64 are accepted and narrowed.
        k: key symbols, same shape, dtype and device.
        granularity: "token", or "run" for ROSA-Tuning's run-length form.
        successor: run granularity only. "available" considers runs that have a successor
            already; "strict" is the published rule.
        max_length: matches longer than this count as this long; None for no limit.
        min_length: a shorter best match is no match.
        attention_mask: ``[B, T]`` padding mask.
        lengths: ``[B]`` lengths of right-padded rows.
        cu_seqlens: ``[N + 1]`` cumulative lengths of documents packed into one row.
        document_ids: ``[B, T]``, a number a document, negative at padding.
        segment_starts: ``[B, T]``, the resolved form of the four above; give at most one.
        counterfactual_bits: ``M > 0`` also returns ``cf_position [B, R, T, M]``.
        counterfactual_at: bool ``[B, T]``, where flips are computed; elsewhere `cf_position`
            repeats `position`. None for everywhere.
        backend: "cpu" (the C++ core), "cuda", "oracle" (quadratic torch), "pipeline" (the core,
            reached through pinned memory; `rosakit.ops.ahead` lets the GPU go on meanwhile) or
            "auto".

    Returns:
        `Match` with the leading shape of `q`, int32, on its device.

    Raises:
        InvalidTypeError: `q` or `k` has another dtype, or they differ in dtype or device.
        InvalidInputError: a shape, an option or a mask does not fit.
        BackendError: the backend asked for by name is not available.
    """
    check_options(granularity, successor, max_length, min_length, counterfactual_bits, backend)
    q, k = _check_symbols(q, k)
    if counterfactual_bits and q.dtype == torch.uint8 and counterfactual_bits > 8:
        raise InvalidInputError(
            f"counterfactual_bits={counterfactual_bits} flips bits that uint8 symbols do not have"
        )
    lead = q.shape[:-1]
    q3, k3 = (x.reshape((1,) * (3 - x.dim()) + tuple(x.shape)) for x in (q, k))
    starts = segments.resolve(
        q3.shape[0],
        q3.shape[2],
        attention_mask=attention_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        document_ids=document_ids,
        segment_starts=segment_starts,
    )
    if starts is not None:
        starts = starts.to(q.device)
    if counterfactual_at is not None:
        counterfactual_at = _check_places(counterfactual_at, q3)
    position, length, cf = torch.ops.rosakit.suffix_match(
        q3,
        k3,
        starts,
        granularity,
        successor,
        _UNLIMITED if max_length is None else max_length,
        min_length,
        counterfactual_bits,
        backend,
        counterfactual_at,
    )
    shape = (*lead, q3.shape[2])
    return Match(
        position.reshape(shape),
        length.reshape(shape),
        cf.reshape(*shape, counterfactual_bits) if counterfactual_bits else None,
    )


def check_options(
    granularity: str,
    successor: str,
    max_length: int | None,
    min_length: int,
    counterfactual_bits: int,
    backend: str,
) -> None:
    for name, value, allowed in (
        ("granularity", granularity, ("token", "run")),
        ("successor", successor, ("available", "strict")),
        ("backend", backend, ("auto", "cpu", "cuda", "oracle", "pipeline")),
    ):
        if value not in allowed:
            raise InvalidInputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if max_length is not None and max_length < 1:
        raise InvalidInputError(f"max_length must be at least 1 or None, got {max_length}")
    if min_length < 1:
        raise InvalidInputError(f"min_length must be at least 1, got {min_length}")
    if max_length is not None and min_length > max_length:
        raise InvalidInputError(
            f"min_length={min_length} exceeds max_length={max_length}: nothing could ever match"
        )
    if not 0 <= counterfactual_bits <= 16:
        raise InvalidInputError(f"counterfactual_bits must be in 0..16, got {counterfactual_bits}")


def _check_places(at: Tensor, q: Tensor) -> Tensor:
    expected = [q.shape[0], q.shape[2]]
    if at.dtype != torch.bool or list(at.shape) != expected:
        raise InvalidInputError(
            f"counterfactual_at must be bool [B, T] = {expected}, got {at.dtype} {list(at.shape)}"
        )
    return at.to(q.device)


def _check_symbols(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if q.shape != k.shape or not 1 <= q.dim() <= 3:
        raise InvalidInputError(
            "q and k must have one shape, [B, R, T], [R, T] or [T]; got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise InvalidTypeError(
            "q and k must share dtype and device; got "
            f"{q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
    if q.dtype == torch.int64:
        q, k = _narrow(q, "q"), _narrow(k, "k")
    if q.dtype not in SYMBOL_DTYPES:
        raise InvalidTypeError(
            f"symbols must be uint8, uint16, int32 or int64 (token ids), got {q.dtype}; "
            "rosakit.symbols.pack turns real-valued channels into symbols"
        )
    if q.dtype == torch.int32 and not torch.compiler.is_compiling() and q.device.type == "cpu":
        for name, x in (("q", q), ("k", k)):
            if x.numel() and int(x.min()) < 0:
                raise InvalidInputError(
                    f"{name} holds negative symbols; token ids start at 0, and padding is marked "
                    "by attention_mask, lengths or document_ids"
                )
    if q.shape[-1] >= 2**31:
        raise InvalidInputError(f"streams of 2**31 symbols or more are not supported: {q.shape}")
    return q, k


def _narrow(x: Tensor, name: str) -> Tensor:
    narrow = x.to(torch.int32)
    if not torch.compiler.is_compiling() and not torch.equal(narrow.to(torch.int64), x):
        raise InvalidInputError(f"{name} holds values outside int32; renumber the symbols first")
    return narrow


@torch.library.custom_op("rosakit::suffix_match", mutates_args=())
def _suffix_match_op(
    q: Tensor,
    k: Tensor,
    segment_starts: Tensor | None,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    counterfactual_bits: int,
    backend: str,
    flip_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = {
        "granularity": granularity,
        "successor": successor,
        "max_length": None if max_length == _UNLIMITED else max_length,
        "min_length": min_length,
        "counterfactual_bits": counterfactual_bits,
    }
    engine = choose_backend(backend, q, granularity, counterfactual_bits)
    cf: Tensor | None
    if engine == "pipeline":
        road = pipeline.shared(q.device)
        ticket = road.submit(q, k, segment_starts=segment_starts, flip_at=flip_at, **options)
        position, length, cf = ticket.result()
    elif engine == "cuda":
        position, length, cf = cuda.match(q, k, segment_starts=segment_starts, **options)
    elif engine == "cpu":
        arrays = native.match(
            q.contiguous().cpu().numpy(),
            k.contiguous().cpu().numpy(),
            segment_starts=None
            if segment_starts is None
            else segment_starts.contiguous().cpu().numpy(),
            flip_at=None if flip_at is None else flip_at.cpu().numpy(),
            **options,
        )
        position, length = (torch.from_numpy(a).to(q.device) for a in arrays[:2])
        cf = None if arrays[2] is None else torch.from_numpy(arrays[2]).to(q.device)
    else:
        position, length, cf = suffix_match_oracle(q, k, segment_starts=segment_starts, **options)
    if cf is None:
        return position, length, position.new_empty((*position.shape, 0))
    if flip_at is not None and engine in ("cuda", "oracle"):  # these compute every flip
        cf = torch.where(flip_at[:, None, :, None], cf, position[..., None])
    return position, length, cf


@_suffix_match_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    segment_starts: Tensor | None,
    granularity: str,
    successor: str,
    max_length: int,
    min_length: int,
    counterfactual_bits: int,
    backend: str,
    flip_at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    position = q.new_empty(q.shape, dtype=torch.int32)
    cf = q.new_empty((*q.shape, counterfactual_bits), dtype=torch.int32)
    return position, torch.empty_like(position), cf


def choose_backend(
    backend: str, q: Tensor, granularity: str = "token", counterfactual_bits: int = 0
) -> str:
    """The engine that answers: "cuda", "cpu" or "oracle".

    "auto" takes the GPU engine for CUDA tensors where it is available and knows the options, the
    C++ core otherwise, and the oracle where the core was not built; the two fallbacks warn once.

    Raises:
        BackendError: a backend was asked for by name that cannot serve these symbols.
    """
    device = q.device
    if backend in ("oracle", "pipeline"):
        return backend
    if backend == "cuda" and (device.type != "cuda" or not cuda.available()):
        raise BackendError(
            f"backend='cuda' needs CUDA tensors and the cuda extra (tensors are on {device}); "
            "install rosakit[cuda], move the symbols to the GPU, or use backend='auto'"
        )
    if backend == "cuda":
        return "cuda"
    if backend == "auto" and device.type == "cuda":
        if not cuda.available():
            warn_once(
                "rosakit: symbols on the GPU are matched on the CPU, because "
                f"{cuda.unavailable_reason()}; install rosakit[cuda] for the fast path"
            )
        elif cuda.supports(q, granularity=granularity, counterfactual_bits=counterfactual_bits):
            return "cuda"
        else:
            warn_once(
                f"rosakit: {q.dtype} symbols at {granularity} granularity and T = {q.shape[-1]} "
                "are matched on the CPU; the GPU engine does not take them"
            )
    if native.available():
        return "cpu"
    if backend == "cpu":
        raise BackendError(
            "backend='cpu' needs the compiled core, which is missing; reinstall rosakit with a "
            "C++ compiler (pip install --force-reinstall rosakit), or use backend='oracle'"
        )
    warn_once(
        "rosakit: the compiled core is missing, so the quadratic oracle answers; reinstall "
        "rosakit with a C++ compiler for the fast path"
    )
    return "oracle"
