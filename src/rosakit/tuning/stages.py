"""Parameter groups, learning rates over time, and the two stages of a run.

In the first stage what was added learns (adapters, token route, LoRA); in the second the base
model's own weights learn as well, at their own rate. Everything here is a function of the step, so
that a resumed run stands exactly where an unbroken one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rosakit.errors import InvalidInputError
from rosakit.tuning.attach import adapters_of, is_attached, rosa_parameters
from rosakit.tuning.base import base_parameters
from rosakit.tuning.lora import lora_parameters
from rosakit.tuning.settings import TuneConfig

__all__ = [
    "BASE",
    "TwoStages",
    "innermost",
    "learning_rates",
    "parameter_groups",
    "rate_at",
]

BASE = "base"
"""Name of the parameter groups of the base model."""


def parameter_groups(model: Any, config: TuneConfig) -> list[dict[str, Any]]:
    """What is trained in either stage, with learning rates; weight decay for matrices only."""
    named: list[tuple[str, str, Tensor, float]] = []
    if is_attached(model):
        addressing = {
            id(p)
            for adapter in adapters_of(model).values()
            for projection in (adapter.q_proj, adapter.k_proj, adapter.selection)
            if projection is not None
            for p in projection.parameters()
        }
        for name, p in rosa_parameters(model).items():
            rate = config.lr
            if name.startswith("token_route."):
                rate = config.lr_token_route
            elif id(p) in addressing:
                rate *= config.qk_lr_scale
            named.append(("", name, p, rate))
    named += [("", name, p, config.lr_lora) for name, p in lora_parameters(model).items()]
    if config.base_from is not None:
        named += [(BASE, n, p, config.lr_base) for n, p in base_parameters(model).items()]
    groups: dict[tuple[str, float, float], list[Tensor]] = {}
    for stage, name, parameter, rate in named:
        matrix = parameter.dim() >= 2 and not name.startswith("token_route.")
        key = (stage, rate, config.weight_decay if matrix else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "stage": stage}
        for (stage, rate, decay), parameters in groups.items()
    ]


def rate_at(step: int, steps: int, *, warmup: float, schedule: str, begin: int = 0) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: optimizer steps done.
        steps: optimizer steps in total.
        warmup: share of the steps from `begin` on over which it rises.
        schedule: "cosine", "linear" or "constant".
        begin: the step before which it is 0.
    """
    if step < begin:
        return 0.0
    done, total = step - begin, max(1, steps - begin)
    rising = round(warmup * total)
    if done < rising:
        return done / rising
    if schedule == "constant":
        return 1.0
    share = min(1.0, (done - rising) / max(1, total - rising))
    return 1.0 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2


def learning_rates(
    optimizer: Any, config: TuneConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of each parameter group."""
    second = None if config.base_from is None else round(config.base_from * steps)

    def of(group: dict[str, Any]) -> Callable[[int], float]:
        base = group.get("stage") == BASE

        def rate(step: int) -> float:
            share = rate_at(
                step,
                steps,
                warmup=config.warmup,
                schedule=config.schedule,
                begin=(second or 0) if base else 0,
            )
            late = second is not None and step >= second
            return share * (config.second_stage_lr_scale if late and not base else 1.0)

        return rate

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [of(g) for g in optimizer.param_groups])


class TwoStages(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Freezes the base model in the first stage of a run and trains it in the second.

    For any Trainer of an attached model (or of a module that holds one); give the optimizer
    `parameter_groups`, so that the base has its own rate. A checkpoint stores where the stages
    meet; a resumed run is in the stage that its step belongs to.

    Args:
        begin: share of all steps at which the second stage begins, 0..1.

    Raises:
        InvalidInputError: a share out of range.
    """

    def __init__(self, begin: float) -> None:
        if not 0 <= begin <= 1:
            raise InvalidInputError(f"the second stage begins at a share 0..1, got {begin}")
        self.begin, self.stage = begin, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"args": {"begin": self.begin}, "attributes": {"stage": self.stage}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage = 0  # parameters are as they were built, whatever was resumed
        self._enter(state, kwargs["model"], kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._enter(state, kwargs["model"], kwargs.get("optimizer"))

    def _enter(self, state: Any, model: nn.Module, optimizer: Any) -> None:
        stage = 1 if state.global_step < round(self.begin * state.max_steps) else 2
        if stage == self.stage:
            return
        self.stage = stage
        inner = next((m for m in model.modules() if is_attached(m)), None)
        if inner is None:
            raise InvalidInputError(
                f"TwoStages found no attached model in {type(model).__name__}; call rosakit.attach "
                "before the Trainer is made"
            )
        for parameter in base_parameters(inner).values():
            parameter.requires_grad_(stage == 2)
            if stage == 1:
                parameter.grad = None
        if stage == 2 and optimizer is not None:
            _begin_afresh(innermost(optimizer))


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper and, inside that, a ZeRO optimizer.

    ZeRO's own is no `torch.optim.Optimizer`, which schedules ask for; it takes the rate of each
    group from the one within.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: torch.optim.Optimizer = optimizer
    return found


def _begin_afresh(optimizer: torch.optim.Optimizer) -> None:
    """Let the steps of parameters that have had no gradient so far count for nothing.

    ZeRO feeds frozen parameters zeros, and Adam's correction of its first moments would have worn
    off by the time they learn.
    """
    for state in optimizer.state.values():
        square, step = state.get("exp_avg_sq"), state.get("step")
        if square is None or step is None or bool(square.any()):
            continue
        if isinstance(step, Tensor):
            step.zero_()
        else:
            state["step"] = 0
