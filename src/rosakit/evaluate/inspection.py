"""What every position of a text recalled: the matches of token route and adapters, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.evaluate.scores import device_of, evaluating, score_labels
from rosakit.layers import RosaAdapter, RosaContext, TokenCandidates
from rosakit.tuning.attach import adapters_of, config_of, controller_of, record_matches
from rosakit.tuning.health import layer_health, match_health, token_route_health
from rosakit.types import Match

__all__ = ["Inspection", "Trace", "inspect_text"]


@dataclass(frozen=True)
class Trace:
    """Where one reader pointed at each of T positions.

    Attributes:
        name: such as "token route, candidate 1", "layer 5" or "layer 5, route 3".
        kind: "candidate" (one of the token route), "span" (recalled into the window), "layer"
            (what most of its routes agree on) or "route" (a single route of an adapter).
        position: index of the token that was read, -1 for none, ``[T]``.
        length: match length in symbols, 0 for none, ``[T]``.
        weight: gate of a candidate, share of a layer's routes that agree; else 1, ``[T]``.
    """

    name: str
    kind: str
    position: list[int]
    length: list[int]
    weight: list[float]


@dataclass(frozen=True)
class Inspection:
    """One text, read by one model.

    Attributes:
        tokens: the text in pieces, one a token.
        log_prob: log probability (nats) of each token after those before it; None for the first.
        base_log_prob: the same without the token route; empty without a route.
        traces: candidates of the token route first, recalled spans, layers and their routes.
        health: metrics by place ("token route", "layer 5"), see `rosakit.tuning.health`.
        faults: messages of the detectors by place, see `rosakit.layers.health`.
        window, sink_tokens: of the model's attention; window None for full attention.
        settings: what was inspected.
    """

    tokens: list[str]
    log_prob: list[float | None]
    base_log_prob: list[float | None]
    traces: tuple[Trace, ...]
    health: dict[str, dict[str, float]]
    faults: dict[str, list[str]]
    window: int | None
    sink_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)


@dataclass
class _Heard:
    """What hooks caught in the one forward pass."""

    contexts: list[RosaContext] = field(default_factory=list)
    candidates: TokenCandidates | None = None
    log_keep: Tensor | None = None
    log_copy: Tensor | None = None
    base: Tensor | None = None


def inspect_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    max_tokens: int = 2048,
    routes: int = 3,
    settings: dict[str, Any] | None = None,
) -> Inspection:
    """Read a text once and note what each position recalled.

    Args:
        model: an attached causal language model with adapters, a token route, or both.
        tokenizer: its tokenizer.
        text: at least two tokens of text.
        max_tokens: the rest of a longer text is left out.
        routes: single routes shown of each adapter: those with the longest matches.
        settings: kept with the result.

    Raises:
        InvalidInputError: too short a text, sizes out of range, or a model that retrieves nothing.
    """
    if max_tokens < 2 or routes < 0:
        raise InvalidInputError(
            f"inspect needs max_tokens >= 2 and routes >= 0, got {max_tokens} and {routes}"
        )
    pieces, ids = _pieces(tokenizer, text, max_tokens)
    controller = controller_of(model)
    adapters = {index: a for index, a in adapters_of(model).items() if a.retrieve}
    config = config_of(model)
    recalled = config.recall if config.retrieve else 0
    if controller.token_route is None and not adapters and not recalled:
        raise InvalidInputError(
            "this model has neither a token route nor recalled spans nor adapters that retrieve, "
            "so there is nothing to inspect; attach it with RosaConfig(token_route=True), "
            "recall=16 or adapters=True"
        )
    row = torch.tensor([ids], device=device_of(model))
    with _listening(model, adapters) as heard, evaluating(model):
        logits = model(input_ids=row, use_cache=False).logits
        own = score_labels(logits[:, :-1], row[:, 1:]).log_prob[0]
    context = heard.contexts[-1]
    health: dict[str, dict[str, float]] = {}
    traces: list[Trace] = []
    if heard.candidates is not None:
        traces += list(_candidate_traces(heard))
        labels = torch.cat([row[:, 1:], row.new_full((1, 1), -100)], dim=1)
        assert heard.log_keep is not None
        health["token route"] = token_route_health(
            heard.candidates, heard.log_keep, labels, window=config.window
        )
    if recalled:
        assert context.token_match is not None
        spans = Match(*(x[:, :recalled] for x in context.token_match[:2]))
        traces += list(_span_traces(spans))
        health["recalled spans"] = match_health(spans, row, window=config.window)
    faults: dict[str, list[str]] = {}
    for index, match in sorted(context.matches.items()):
        place = f"layer {index}"
        traces += _layer_traces(place, match, routes)
        health[place], found = layer_health(adapters[index], context, window=config.window)
        if found:
            faults[place] = [fault.message for fault in found]
    base = [] if heard.base is None else [None, *heard.base.tolist()]
    return Inspection(
        pieces,
        [None, *own.tolist()],
        base,
        tuple(traces),
        health,
        faults,
        config.window,
        config.sink_tokens if config.window is not None else 0,
        {"tokens": len(ids), **(settings or {})},
    )


def _pieces(tokenizer: Any, text: str, limit: int) -> tuple[list[str], list[int]]:
    """The text of each token; pieces that split a character show it at its first token."""
    options = {"add_special_tokens": False}
    try:
        coded = tokenizer(text, return_offsets_mapping=True, **options)
        spans = coded["offset_mapping"][:limit]
    except (NotImplementedError, KeyError):  # tokenizers in Python know no offsets
        coded, spans = tokenizer(text, **options), None
    ids = list(coded["input_ids"])[:limit]
    if len(ids) < 2:
        raise InvalidInputError(f"the text has {len(ids)} tokens, inspect needs at least 2")
    if spans is None:
        return [tokenizer.decode([i]) for i in ids], ids
    pieces, end = [], 0
    for _, stop in spans:
        pieces.append(text[end:stop])  # white space that the tokenizer dropped goes with it
        end = max(end, stop)
    return pieces, ids


@contextmanager
def _listening(model: Any, adapters: dict[int, RosaAdapter]) -> Iterator[_Heard]:
    heard, handles = _Heard(), []

    def gated(route: Any, args: tuple[Tensor, Tensor, TokenCandidates], output: Tensor) -> None:
        hidden, logits, found = args
        work = logits.float()
        log_p = work.gather(-1, found.token) - work.logsumexp(-1, keepdim=True)
        heard.candidates = found
        heard.log_keep, heard.log_copy = route.gate(hidden, log_p, found)
        ids = heard.contexts[-1].input_ids
        assert ids is not None
        heard.base = score_labels(logits[:, :-1], ids[:, 1:]).log_prob[0]

    route = controller_of(model).token_route
    if route is not None:
        handles.append(route.register_forward_hook(gated))
    try:
        with record_matches(model, keep_inputs=True) as heard.contexts:
            yield heard
    finally:
        for handle in handles:
            handle.remove()


def _candidate_traces(heard: _Heard) -> Iterator[Trace]:
    found, gates = heard.candidates, heard.log_copy
    assert found is not None
    assert gates is not None
    own = torch.arange(found.token.shape[1], device=found.token.device)
    for rank in range(found.token.shape[2]):
        valid = found.length[0, :, rank] > 0
        position = torch.where(valid, own - found.distance[0, :, rank], -1)
        gate = torch.where(valid, gates[0, :, rank].exp(), 0.0)
        yield Trace(
            f"token route, candidate {rank + 1}",
            "candidate",
            position.tolist(),
            found.length[0, :, rank].tolist(),
            [round(g, 4) for g in gate.tolist()],
        )


def _span_traces(match: Match) -> Iterator[Trace]:
    for rank in range(match.position.shape[1]):
        position, length = match.position[0, rank], match.length[0, rank]
        name = f"recalled span {rank + 1}"
        weight = [1.0] * len(position)
        yield Trace(name, "span", position.tolist(), length.tolist(), weight)


def _layer_traces(place: str, match: Match, routes: int) -> Iterator[Trace]:
    """What most routes of a layer agree on, then the routes with the longest matches."""
    position, length = match.position[0].to(torch.int64).cpu(), match.length[0].cpu()
    agreed = position.mode(dim=0).values
    same = position == agreed
    share = same.float().mean(0)
    longest = torch.where(same, length, 0).max(0).values
    yield Trace(
        place, "layer", agreed.tolist(), longest.tolist(), [round(s, 3) for s in share.tolist()]
    )
    best = length.float().mean(1).argsort(descending=True, stable=True)[:routes]
    for route in sorted(best.tolist()):
        yield Trace(
            f"{place}, route {route}",
            "route",
            position[route].tolist(),
            length[route].tolist(),
            [1.0] * position.shape[1],
        )
