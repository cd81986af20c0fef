"""Health of retrieval: the numbers that tell a working memory from one that only looks trained.

Loss, match rate and match length can all look healthy while the positions that are read mean
nothing; agreement of tokens at those positions, entropy of the worst route and the share of reads
beyond the window expose it. Everything here is a pure function of matches, symbols and token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rosakit import symbols
from rosakit.layers import RosaAdapter, RosaContext, TokenCandidates
from rosakit.layers.health import Fault, find_faults
from rosakit.types import Match

__all__ = ["layer_health", "match_health", "mean_health", "symbol_health", "token_route_health"]


@torch.no_grad()
def layer_health(
    adapter: RosaAdapter,
    context: RosaContext,
    *,
    window: int | None = None,
    whole: bool = True,
) -> tuple[dict[str, float], list[Fault]]:
    """One layer's retrieval in a recorded forward pass of whole sequences: numbers and faults.

    Args:
        adapter: the layer's adapter.
        context: of a pass that was recorded with `keep_inputs`.
        window: attention window in tokens, or None.
        whole: this process holds the adapter's whole parameters; False looks at the match alone.

    Returns:
        What `match_health` and `symbol_health` say, `levels` (mean ``|e1 - e0|``) and
        `qk_agreement` (share of equal bits of q and k), and the faults.
    """
    index, starts = adapter.layer_index, context.segment_starts
    match, ids = context.matches[index], context.input_ids
    values = {}
    if ids is not None:
        values = match_health(
            match, ids, segment_starts=starts, window=window, granularity=adapter.granularity
        )
    if not whole:
        return values, []
    values["levels"] = float((adapter.e1 - adapter.e0).abs().float().mean())
    q = k = None
    if index in context.inputs and adapter.learns_address:
        q, k = adapter.addresses(context.inputs[index], context)
        packed = symbols.pack(q, adapter.bits)
        values |= symbol_health(packed, adapter.bits, segment_starts=starts)
        batch, length = q.shape[:2]
        real = _real(starts, batch, length, q.device)[..., None]
        values["qk_agreement"] = _share((q > 0) == (k > 0), real.expand_as(q))
    faults = find_faults(
        q, k, match, adapter.e0, adapter.e1, bits=adapter.bits, segment_starts=starts
    )
    return values, faults


def match_health(
    match: Match,
    input_ids: Tensor,
    *,
    segment_starts: Tensor | None = None,
    window: int | None = None,
    granularity: str = "token",
) -> dict[str, float]:
    """What one layer's matches point at.

    Args:
        match: position and length int32 ``[B, R, T]``, cf_position ``[B, R, T, M]`` or None.
        input_ids: ``[B, T]``.
        segment_starts: int32 ``[B, T]`` or None (see `rosakit.ops.segments`).
        window: attention window in tokens, or None.
        granularity: "token" has a key token right before the read position.

    Returns:
        `match_rate` and `null_rate` (shares of real positions and routes), `match_length` (mean
        over matches, in symbols or runs), `next_token` (the token read is the one that follows),
        `key_token` (the token before it is the current one; token granularity), `beyond_window`
        (share of matches read beyond the window) and `flip_change` (share of single-bit flips of
        the query that move the read position). Shares without anything to count are left out.
    """
    batch, _, length = match.position.shape
    real = _real(segment_starts, batch, length, match.position.device)
    matched = (match.position >= 0) & real[:, None]
    places = real.sum() * match.position.shape[1]
    count = matched.sum()
    out: dict[str, float] = {}
    if not int(places):
        return out
    rate = float(count / places)
    out |= {"match_rate": rate, "null_rate": 1 - rate}
    out["match_length"] = float((match.length * matched).sum() / count.clamp(min=1))
    if int(count):
        ids = input_ids[:, None].expand(-1, match.position.shape[1], -1)
        position = match.position.to(torch.int64).clamp(min=0)
        after, known = _following(input_ids, segment_starts)
        asked = matched & known[:, None]
        agree = ids.gather(2, position) == after[:, None]
        out["next_token"] = _share(agree, asked)
        if granularity == "token":
            key = ids.gather(2, (position - 1).clamp(min=0))
            out["key_token"] = _share(key == ids, matched)
        if window is not None:
            own = torch.arange(length, device=position.device)
            out["beyond_window"] = _share(own - position >= window, matched)
    if match.cf_position is not None:
        moved = match.cf_position != match.position[..., None]
        out["flip_change"] = _share(moved, real[:, None, :, None].expand_as(moved))
    return out


def symbol_health(
    stream: Tensor, bits: int, *, segment_starts: Tensor | None = None
) -> dict[str, float]:
    """Entropy of the symbols of each route in bits, at most `bits`.

    Args:
        stream: integer symbols ``[B, R, T]``.
        bits: bits a symbol.
        segment_starts: int32 ``[B, T]`` or None.

    Returns:
        `entropy` (mean over routes) and `entropy_worst` (the lowest route).
    """
    batch, routes, length = stream.shape
    real = _real(segment_starts, batch, length, stream.device)
    total = int(real.sum())
    if not total:
        return {}
    route = torch.arange(routes, device=stream.device)[:, None] << bits
    # [R, B * T] without padding, every route counted in its own range of bins.
    flat = stream.to(torch.int64).transpose(0, 1).flatten(1)[:, real.flatten()]
    counts = torch.bincount((flat + route).flatten(), minlength=routes << bits)
    p = counts.view(routes, -1).double() / total
    entropy = -(p * p.clamp(min=1e-300).log2()).sum(1)
    return {"entropy": float(entropy.mean()), "entropy_worst": float(entropy.min())}


def token_route_health(
    found: TokenCandidates,
    keep: Tensor,
    labels: Tensor,
    *,
    window: int | None = None,
    ignore: int = -100,
) -> dict[str, float]:
    """What the token route finds, how often it is right, and how far its gate is open.

    Args:
        found: candidates ``[B, T, K]`` for the token after each position.
        keep: ``log g_keep [B, T]``.
        labels: the tokens that follow, ``[B, T]``, `ignore` where there is none.
        window: attention window in tokens, or None.

    Returns:
        `candidate_rate` and `route_null_rate` (positions with and without a candidate); among
        those with one: `hit_rate` (some candidate is right), `first_hit_rate` (the best one is),
        `route_match_length` (mean match length of the best one, in tokens),
        `route_beyond_window` (the best one was read beyond the window) and `gate` (mean of
        ``1 - g_keep``).
    """
    asked = labels != ignore
    valid = (found.length > 0) & asked[..., None]
    some = valid[..., 0]
    out: dict[str, float] = {}
    if not bool(asked.any()):
        return out
    rate = _share(some, asked)
    out |= {"candidate_rate": rate, "route_null_rate": 1 - rate}
    if bool(some.any()):
        right = valid & (found.token == labels[..., None])
        out["hit_rate"] = _share(right.any(-1), some)
        out["first_hit_rate"] = _share(right[..., 0], some)
        out["route_match_length"] = float(found.length[..., 0][some].float().mean())
        if window is not None:
            out["route_beyond_window"] = _share(found.distance[..., 0] >= window, some)
        out["gate"] = float((1 - keep.detach().float().exp())[some].mean())
    return out


def mean_health(layers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """One line for all layers: means, and the minimum of what is called worst."""
    gathered: dict[str, list[float]] = {}
    for values in layers:
        for name, value in values.items():
            gathered.setdefault(name, []).append(value)
    return {
        name: min(values) if name.endswith("_worst") else sum(values) / len(values)
        for name, values in gathered.items()
    }


def _real(starts: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    if starts is None:
        return torch.ones((batch, length), dtype=torch.bool, device=device)
    return starts.to(device) >= 0


def _following(ids: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next token ``[B, T]`` of each position, and whether its document has one."""
    after = torch.roll(ids, -1, 1)
    known = torch.ones_like(ids, dtype=torch.bool)
    known[:, -1] = False
    if starts is not None:
        starts = starts.to(ids.device)
        known &= (starts == torch.roll(starts, -1, 1)) & (starts >= 0)
    return after, known


def _share(what: Tensor, among: Tensor) -> float:
    return float((what & among).sum() / among.sum().clamp(min=1))
