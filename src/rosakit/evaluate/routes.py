"""Scoring several token routes on one frozen base, for the price of one forward pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rosakit.errors import InvalidInputError
from rosakit.evaluate.scores import LabelScores, Scorer
from rosakit.layers import TokenRoute
from rosakit.tuning.attach import controller_of
from rosakit.tuning.route_features import IGNORE, FeatureReader, label_scores

__all__ = ["route_scorer"]


def route_scorer(
    model: Any,
    routes: Mapping[str, TokenRoute | None],
    *,
    cache: str | os.PathLike[str] | None = None,
) -> Scorer:
    """A scorer of variants that differ in their token route only.

    The scores equal those of the whole model with each route attached in turn.

    Args:
        model: attached with a token route, whose weights do not matter here; it has at least as
            many candidates as each of the routes.
        routes: by name of the variant; None for the model without a route.
        cache: folder that keeps what the model computed, for another run; None to keep nothing.

    Raises:
        InvalidInputError: the model is not attached, has no token route, or one with fewer
            candidates or another `min_length` than a route of a variant.
    """
    reader = FeatureReader(model, cache)
    own = controller_of(model).token_route
    assert own is not None
    for name, route in routes.items():
        if route is not None and (
            route.candidates > own.candidates or route.min_length != own.min_length
        ):
            raise InvalidInputError(
                f"variant {name!r} needs {route.candidates} candidates of min_length "
                f"{route.min_length}, the attached model finds {own.candidates} of "
                f"{own.min_length}; attach it with token_candidates={route.candidates} and "
                f"token_min_length={route.min_length}"
            )

    def score(
        input_ids: Tensor, mask: Tensor | None = None, keep: int | None = None
    ) -> dict[str, LabelScores]:
        batch = {"input_ids": input_ids, "labels": input_ids}
        if mask is not None:
            batch["attention_mask"] = mask.to(torch.int64)
            batch["labels"] = input_ids.masked_fill(~mask, IGNORE)
        features = reader.read(batch, keep)
        kept = input_ids.shape[1] - 1 if keep is None else keep
        real = (batch["labels"][:, -kept:] != IGNORE).cpu()
        scored = {}
        for name, route in routes.items():
            if route is None:
                log_prob = features.label_log_p
                greedy = features.label_log_p >= features.top_log_p
            else:
                here = features.first(route.candidates).to(route.keep_bias.device)
                with torch.no_grad():
                    log_prob, greedy = (x.cpu() for x in label_scores(route, here))
            spread = torch.zeros(real.shape, dtype=torch.float32)
            spread[real] = log_prob
            right = torch.zeros(real.shape, dtype=torch.bool)
            right[real] = greedy
            scored[name] = LabelScores(spread, right)
        return scored

    return score
