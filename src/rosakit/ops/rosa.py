"""`rosa`: the whole operator behind one function, like scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops import ahead, segments
from rosakit.ops.ahead import Ahead
from rosakit.ops.estimators import registry
from rosakit.ops.match import check_options as check_match_options
from rosakit.ops.retrieve import check_values
from rosakit.ops.value_heads import check_value_groups, share_values
from rosakit.types import Backend, Granularity, Match, Successor, Unmatched


@overload
def rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    return_match: Literal[True],
    **options: Any,
) -> tuple[Tensor, Match]: ...
@overload
def rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    return_match: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
def rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e0: Tensor,
    e1: Tensor,
    *,
    bits: int,
    estimator: str = "counterfactual",
    unmatched: Unmatched = "zero",
    e_null: Tensor | None = None,
    granularity: Granularity = "token",
    successor: Successor = "available",
    max_length: int | None = None,
    min_length: int = 1,
    attention_mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    segment_starts: Tensor | None = None,
    backend: Backend = "auto",
    given: Ahead | None = None,
    value_groups: int = 1,
    return_match: bool = False,
    **estimator_options: Any,
) -> Tensor | tuple[Tensor, Match]:
    """ROSA on real-valued channels: binarise, match suffixes, read the successor's value bits.

    ``y[t] = e0 + (e1 - e0) * (v[position(t)] > 0)`` where route ``r`` of the query (channels
    ``r * bits .. r * bits + bits - 1`` of `q`) matched; `unmatched` decides the rest.

    Args:
        q: queries ``[B, T, C]``, floating point, ``C = R * bits``.
        k: keys, same shape, dtype and device.
        v: values, same shape and device.
        e0: ``[C]``, the value that a 0 bit injects.
        e1: ``[C]``, the value that a 1 bit injects.
        bits: bits per route, 1..16.
        estimator: how gradients flow; see ``rosakit.ops.estimators.names()``.
        unmatched: what a position without match reads: "zero", "self" (its own value) or "null".
        e_null: ``[C]``, the learned vector of ``unmatched="null"``.
        granularity: "token" or "run"; see `rosakit.ops.suffix_match`.
        successor: "available" or "strict"; run granularity only.
        max_length: longer matches count as this long.
        min_length: a shorter best match is no match.
        attention_mask: ``[B, T]`` padding mask.
        lengths: ``[B]`` lengths of right-padded rows.
        cu_seqlens: ``[N + 1]`` cumulative lengths of documents packed into one row.
        document_ids: ``[B, T]``, a number a document, negative at padding.
        segment_starts: ``[B, T]``, the resolved form of the four above; give at most one.
        backend: "auto", "cpu", "cuda", "pipeline" or "oracle".
        given: the match of these very `q` and `k` under these options, begun earlier with
            `rosakit.ops.ahead.begin`; estimator "counterfactual" only.
        value_groups: this many neighbouring routes read one value head: `v` is then
            ``[B, T, C / value_groups]``, and the gradient of a head is the sum over its routes.
        return_match: also return the `Match` that was read.
        **estimator_options: options of the estimator.

    Returns:
        ``y [B, T, C]`` in the dtype of `v`, or ``(y, match)``.

    Raises:
        InvalidTypeError: a dtype does not fit.
        InvalidInputError: a shape, option or mask does not fit.
    """
    v = _shared_values(q, v, value_groups, bits)
    if not q.shape == k.shape == v.shape:
        raise InvalidInputError(
            f"q, k and v must have one shape [B, T, C]; got {list(q.shape)}, {list(k.shape)} "
            f"and {list(v.shape)}"
        )
    if not (q.is_floating_point() and k.is_floating_point()):
        raise InvalidTypeError(f"q and k must be floating point, got {q.dtype} and {k.dtype}")
    if not q.device == k.device == v.device:
        raise InvalidTypeError(f"q, k and v are on {q.device}, {k.device} and {v.device}")
    check_values(v, e0, e1, bits, unmatched, e_null)
    check_match_options(granularity, successor, max_length, min_length, bits, backend)
    registry.check_options(estimator, estimator_options)
    if given is not None and estimator != "counterfactual":
        raise InvalidInputError(
            f"a match found ahead serves estimator='counterfactual', not {estimator!r}; "
            "leave `given` out, and the estimator finds its own"
        )
    starts = segments.resolve(
        q.shape[0],
        q.shape[1],
        attention_mask=attention_mask,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        document_ids=document_ids,
        segment_starts=segment_starts,
    )
    options = registry.MatchOptions(
        granularity,
        successor,
        max_length,
        min_length,
        None if starts is None else starts.to(q.device),
        backend,
        None if given is None else ahead.finish(given),
    )
    y, match = registry.get(estimator)(
        q,
        k,
        v,
        e0,
        e1,
        bits=bits,
        match=options,
        unmatched=unmatched,
        e_null=e_null,
        **estimator_options,
    )
    return (y, match) if return_match else y


def _shared_values(q: Tensor, v: Tensor, groups: int, bits: int) -> Tensor:
    """Value heads repeated for the routes that read them."""
    if groups == 1:
        return v
    routes = q.shape[-1] // bits
    check_value_groups(groups, routes)
    if v.dim() != 3 or v.shape[-1] * groups != q.shape[-1]:
        raise InvalidInputError(
            f"with value_groups={groups}, v must have shape [B, T, {q.shape[-1] // groups}], "
            f"got {list(v.shape)}"
        )
    return share_values(v, groups, bits)
