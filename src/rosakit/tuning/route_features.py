"""What the token route's loss depends on when everything else is frozen.

The route's output at a label needs the label's and the candidates' log probabilities, the hidden
state and the matches: some six hundred numbers a position instead of a forward pass and a
vocabulary. Read once, they serve any number of passes of training, several routes (the control is
one), and exact scores of each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosakit.errors import InvalidInputError
from rosakit.files import atomic_write
from rosakit.layers import TokenCandidates, TokenRoute
from rosakit.layers.token_route import mixed_log_prob
from rosakit.tuning.attach import controller_of

__all__ = [
    "FeatureReader",
    "RouteFeatures",
    "concatenate",
    "label_log_prob",
    "label_scores",
    "tapped",
]

IGNORE = -100
"""Label of positions that are not predicted."""

_CHUNK = 2**25
"""Logits normalised at a time."""


@dataclass(frozen=True)
class RouteFeatures:
    """The N predicted positions of one or several sequences, in order.

    Attributes:
        hidden: ``[N, H]``, what the output embedding reads, in the model's dtype.
        token, length, distance: ``[N, K]``, the candidates; length 0 marks an empty place.
        log_p: float32 ``[N, K]``, log probabilities of the candidates under the model, nats.
        own, own_log_p: ``[N]``, the position's own token (the control's candidate) and its log
            probability as the next token.
        label, label_log_p: ``[N]``, the next token and its log probability.
        top_log_p: ``[N]``, the largest log probability.
    """

    hidden: Tensor
    token: Tensor
    length: Tensor
    distance: Tensor
    log_p: Tensor
    own: Tensor
    own_log_p: Tensor
    label: Tensor
    label_log_p: Tensor
    top_log_p: Tensor

    def __len__(self) -> int:
        return int(self.label.shape[0])

    def pick(self, index: Tensor | slice) -> RouteFeatures:
        """Some of the positions."""
        return RouteFeatures(**{name: value[index] for name, value in vars(self).items()})

    def first(self, candidates: int) -> RouteFeatures:
        """The same with fewer candidates: they are ordered, so the first ones are the best."""
        names = ("token", "length", "distance", "log_p")
        return replace(self, **{name: getattr(self, name)[:, :candidates] for name in names})

    def to(self, device: torch.device | str) -> RouteFeatures:
        """The same on another device."""
        return RouteFeatures(**{name: value.to(device) for name, value in vars(self).items()})


def concatenate(parts: Sequence[RouteFeatures]) -> RouteFeatures:
    """All positions of all parts."""
    names = [entry.name for entry in fields(RouteFeatures)]
    return RouteFeatures(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


class Tapped(NamedTuple):
    """What the token route of an attached model is called with."""

    hidden: Tensor
    logits: Tensor
    found: TokenCandidates


class _Tap(nn.Module):
    """Stands in for a token route: keeps its inputs and leaves the logits alone."""

    retrieve = True

    def __init__(self, route: TokenRoute) -> None:
        super().__init__()
        self.candidates, self.min_length = route.candidates, route.min_length
        self.calls: list[Tapped] = []

    def forward(self, hidden: Tensor, logits: Tensor, found: TokenCandidates) -> Tensor:
        self.calls.append(Tapped(hidden, logits, found))
        return logits


@contextmanager
def tapped(model: Any) -> Iterator[list[Tapped]]:
    """Inside the block the model's token route is silent and its inputs are collected.

    Yields:
        A list that grows by one `Tapped` a forward pass. The candidates are the retrieved
        ones, also if the route is a control.

    Raises:
        InvalidInputError: the model is not attached, or has no token route.
    """
    controller = controller_of(model)
    route = controller.token_route
    if route is None:
        raise InvalidInputError(
            "this model has no token route; attach it with RosaConfig(token_route=True)"
        )
    tap = _Tap(route)
    controller._modules["token_route"] = tap
    try:
        yield tap.calls
    finally:
        controller._modules["token_route"] = route


def extract(call: Tapped, input_ids: Tensor, labels: Tensor) -> RouteFeatures:
    """Features of the positions with a label.

    Args:
        call: of one forward pass, for the last ``t`` positions of the sequences.
        input_ids: ``[B, T]``, ``T >= t``.
        labels: ``[B, T]``, aligned with `input_ids` (the model shifts them); -100 is not predicted.
    """
    kept = call.logits.shape[1]
    own = input_ids[:, -kept:]
    label = torch.full_like(own, IGNORE)
    label[:, :-1] = labels[:, -kept:][:, 1:]
    chosen = label != IGNORE
    token, label, own = call.found.token[chosen], label[chosen], own[chosen]
    asked = torch.cat([token, own[:, None], label[:, None]], dim=1)
    logits, row = call.logits.flatten(0, 1), chosen.flatten().nonzero()[:, 0]
    log_p = torch.empty(asked.shape, dtype=torch.float32, device=asked.device)
    top = torch.empty(len(asked), dtype=torch.float32, device=asked.device)
    step = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, len(asked), step):
        part = slice(start, start + step)
        work = logits[row[part]].float()
        normalizer = work.logsumexp(-1)
        log_p[part] = work.gather(-1, asked[part]) - normalizer[:, None]
        top[part] = work.amax(-1) - normalizer
    return RouteFeatures(
        hidden=call.hidden[chosen],
        token=token,
        length=call.found.length[chosen],
        distance=call.found.distance[chosen],
        log_p=log_p[:, :-2].contiguous(),
        own=own,
        own_log_p=log_p[:, -2].contiguous(),
        label=label,
        label_log_p=log_p[:, -1].contiguous(),
        top_log_p=top,
    )


class _Gated(NamedTuple):
    """N positions under a route: its candidates, what the model gives them, and the gates."""

    found: TokenCandidates
    log_p: Tensor
    log_keep: Tensor
    log_copy: Tensor

    def score(self, asked: Tensor, log_p: Tensor) -> Tensor:
        """Log probability of tokens ``[N, M]`` to which the model gives `log_p`."""
        return mixed_log_prob(asked, log_p, self.log_keep, self.log_copy, self.found)


def label_log_prob(route: TokenRoute, features: RouteFeatures) -> Tensor:
    """Log probability of each label under the mixture, float32 ``[N]``, nats.

    The same numbers as those of the whole model. Differentiable in the route's parameters.

    Args:
        route: a token route, or a control (``retrieve=False``).
        features: of N positions, with as many candidates as the route has.
    """
    gated = _gate(route, features)
    return gated.score(features.label[:, None], features.label_log_p[:, None])[:, 0]


@torch.no_grad()
def label_scores(route: TokenRoute, features: RouteFeatures) -> tuple[Tensor, Tensor]:
    """`label_log_prob`, and whether each label is the most probable token, bool ``[N]``."""
    gated = _gate(route, features)
    label = features.label[:, None]
    scored = gated.score(label, features.label_log_p[:, None])[:, 0]
    rival = gated.score(gated.found.token, gated.log_p)
    other = (gated.found.length > 0) & (gated.found.token != label)
    rival = torch.where(other, rival, -torch.inf).amax(-1)
    # The model's own favourite, unless it is the label itself.
    kept = features.top_log_p + gated.log_keep
    is_top = features.label_log_p >= features.top_log_p
    return scored, (scored >= rival) & (is_top | (scored >= kept))


def _gate(route: TokenRoute, features: RouteFeatures) -> _Gated:
    found = TokenCandidates(features.token, features.length, features.distance)
    log_p = features.log_p
    if not route.retrieve:
        found = route.own_value_candidates(features.own, found)
        log_p = torch.where(found.length > 0, features.own_log_p[:, None], log_p)
    return _Gated(found, log_p, *route.gate(features.hidden, log_p, found))


class FeatureReader:
    """Reads features of batches from a model, and keeps them on disk if asked to.

    Args:
        model: attached with a token route; nothing of it is trained here.
        cache: folder of the features; None to keep nothing. Files are named by the model's
            weights, what is attached, and the batch, and appear complete or not at all, so an
            interrupted run goes on where it stopped.

    Raises:
        InvalidInputError: the model is not attached, or has no token route.
    """

    def __init__(self, model: Any, cache: str | os.PathLike[str] | None = None) -> None:
        with tapped(model):
            pass  # refuses early
        self.model = model
        self.cache = None if cache is None else Path(cache)
        self._identity = "" if cache is None else fingerprint(model)

    def read(self, batch: Mapping[str, Tensor], keep: int | None = None) -> RouteFeatures:
        """Features of one batch.

        Args:
            batch: `input_ids` and `labels`, ``[B, T]`` (or ``[T]``), and whatever else the model
                takes; `labels` default to `input_ids`.
            keep: predict the last `keep` tokens only; None for all.
        """
        tensors = {name: x[None] if x.dim() == 1 else x for name, x in batch.items()}
        path = self._path(tensors, keep)
        if path is not None and path.is_file():
            found = _load(path)
            if found is not None:
                return found
        features = self._compute(tensors, keep)
        if path is not None:
            _save(path, features)
        return features

    def _compute(self, batch: Mapping[str, Tensor], keep: int | None) -> RouteFeatures:
        model = self.model
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {name: x.to(device) for name, x in batch.items()}
        labels: Tensor = inputs.pop("labels", inputs["input_ids"])
        if keep is not None:
            # One position more: the one that predicts the first of them.
            inputs["logits_to_keep"] = keep + 1
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), tapped(model) as calls:
                model(**inputs, use_cache=False)
        finally:
            model.train(training)
        return extract(calls[0], inputs["input_ids"], labels).to("cpu")

    def _path(self, batch: Mapping[str, Tensor], keep: int | None) -> Path | None:
        if self.cache is None:
            return None
        digest = hashlib.sha256(f"{self._identity} {keep}".encode())
        for name in sorted(batch):
            digest.update(f"{name}{list(batch[name].shape)}{batch[name].dtype}".encode())
            digest.update(batch[name].cpu().contiguous().numpy().tobytes())
        return self.cache / f"{digest.hexdigest()[:32]}.safetensors"


def fingerprint(model: Any) -> str:
    """Names a frozen model: its weights and what is attached, without the token route's weights."""
    controller = controller_of(model)
    own = (
        set()
        if controller.token_route is None
        else {id(p) for p in controller.token_route.parameters()}
    )
    config = controller.config.to_dict()
    del config["retrieve"]  # without adapters it concerns the token route alone …
    if controller.injected:
        config["retrieve"] = controller.config.retrieve  # … with them it does not
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            digest.update(f"{name}{list(parameter.shape)}{parameter.dtype}".encode())
            raw = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def _load(path: Path) -> RouteFeatures | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return RouteFeatures(**load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None  # damaged or from another version: it is read from the model again


def _save(path: Path, features: RouteFeatures) -> None:
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({k: v.contiguous() for k, v in vars(features).items()}))
    except OSError as error:
        raise InvalidInputError(
            f"cannot keep features in {path.parent}: {error.strerror or error}; free some space "
            "or name another folder"
        ) from error
