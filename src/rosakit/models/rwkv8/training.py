"""Training the demos' models from scratch, as their scripts do, with any estimator.

AdamW with a cosine from 1e-3 to 1e-6, batches of 128 fresh sequences, cross entropy on the counted
tokens. A run lives in a folder (weights, what is needed to resume, the curve) and resumes exactly:
the same steps as an unbroken run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from rosakit.errors import CheckpointError, InvalidInputError, RosakitError
from rosakit.files import atomic_write
from rosakit.models.rwkv8 import checkpoint, tasks
from rosakit.models.rwkv8.accuracy import Accuracy, by_length, evaluate
from rosakit.models.rwkv8.loading import load, save
from rosakit.models.rwkv8.models import (
    CountingConfig,
    CountingModel,
    HybridConfig,
    HybridModel,
    RosaModel,
)
from rosakit.models.rwkv8.tasks import Batch, Task

HELD_OUT = 512
"""Sequences of the validation set, drawn with a seed of their own."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        task: "count", "reverse" or "arithmetic".
        estimator: gradient estimator of the ROSA layers.
        estimator_options: its options.
        channels: C; None for the demo's (64, 32, 128).
        layers: number of layers; None for the demo's (1, 2, 2). Counting: 0 is the token memory
            alone.
        bits: bits a route, 1 or 4.
        rosa: False leaves the ROSA blocks out (reverse and arithmetic): the control.
        digits: longest numbers; None for the demo's (3, 60, 20).
        length: T; None for the demo's.
        steps: optimiser steps.
        batch: sequences a step.
        learning_rate: at the start of the cosine.
        final_learning_rate: at its end.
        weight_decay: of AdamW.
        clip: largest gradient norm; None for no limit.
        seed: of the weights and the sequences.
        device: where to train.
    """

    task: str = "count"
    estimator: str = "counterfactual"
    estimator_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    channels: int | None = None
    layers: int | None = None
    bits: int = 1
    rosa: bool = True
    digits: int | None = None
    length: int | None = None
    steps: int = 1000
    batch: int = 128
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    weight_decay: float = 0.01
    clip: float | None = None
    seed: int = 0
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Progress:
    """One finished step: its number from 1, its loss (nats a counted token) and learning rate."""

    step: int
    loss: float
    learning_rate: float


@dataclasses.dataclass
class TrainResult:
    """What a run reached.

    Attributes:
        config: the run.
        parameters: number of trained parameters.
        losses: training loss of every step, nats a counted token.
        validation_loss: on held-out sequences, nats a counted token.
        by_length: accuracy on them by digits.
        demo: accuracy on the published evaluation.
        seconds: time of the steps made by this process.
    """

    config: TrainConfig
    parameters: int
    losses: list[float]
    validation_loss: float
    by_length: Accuracy
    demo: Accuracy
    seconds: float

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last 50 steps."""
        tail = self.losses[-50:]
        return sum(tail) / len(tail)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "parameters": self.parameters,
            "final_loss": self.final_loss,
            "validation_loss": self.validation_loss,
            "by_length": self.by_length.to_dict(),
            "demo": self.demo.to_dict(),
            "seconds": self.seconds,
            "losses": [round(x, 5) for x in self.losses],
        }


def make_model(config: TrainConfig, task: Task) -> RosaModel:
    """The demo's model for a task, with the run's sizes.

    Raises:
        InvalidInputError: a size does not fit, or the control was asked of the counting task.
    """
    vocabulary = len(task.symbols)
    if config.task == "count":
        if not config.rosa:
            raise InvalidInputError("the counting model without ROSA layers is layers=0")
        layers = 1 if config.layers is None else config.layers
        if layers < 0:
            raise InvalidInputError(f"layers must not be negative, got {layers}")
        channels = config.channels or 64
        return CountingModel(CountingConfig(vocabulary, channels, layers, config.bits))
    channels = config.channels or {"reverse": 32, "arithmetic": 128}[config.task]
    layers = 2 if config.layers is None else config.layers
    if layers < 1:
        raise InvalidInputError(f"task {config.task} needs at least one layer, got {layers}")
    rank = 8 if config.task == "reverse" else 16
    sizes = HybridConfig(
        vocabulary,
        channels,
        layers,
        config.bits,
        rank=(rank,) * 4,
        hidden=4 * channels,
        rosa=config.rosa,
    )
    return HybridModel(sizes)


class Trainer:
    """One run, step by step.

    Args:
        config: the run.
        folder: where it is saved; None keeps it in memory.
        resume: continue the run saved in `folder`, if there is one.

    Raises:
        InvalidInputError: sizes, task or estimator do not fit.
        CheckpointError: the folder holds another run, or a damaged one.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        if config.steps < 1 or config.batch < 1:
            raise InvalidInputError(
                f"steps and batch must be at least 1, got {config.steps} and {config.batch}"
            )
        self.config = config
        self.folder = None if folder is None else Path(folder)
        self.task = tasks.make(config.task, config.digits, config.length)
        torch.manual_seed(config.seed)
        self.model = make_model(config, self.task).to(config.device)
        self.model.use_estimator(config.estimator, config.estimator_options)
        self.rng = random.Random(config.seed)
        self.losses: list[float] = []
        self.seconds = 0.0
        saved = self._read_saved(resume)
        if saved is not None:
            assert self.folder is not None
            self.model.load_state_dict(load(self.folder, bits=config.bits).state_dict())
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        if saved is not None:
            self._restore(saved)

    @property
    def step(self) -> int:
        """Steps made."""
        return len(self.losses)

    def run(
        self,
        report: Callable[[Progress], None] | None = None,
        save_every: int = 200,
    ) -> TrainResult:
        """Train to the end, evaluate, and save where there is a folder.

        Args:
            report: called after every step.
            save_every: steps between saves.

        Raises:
            RosakitError: the loss is no longer finite.
        """
        begin = time.perf_counter()
        while self.step < self.config.steps:
            progress = self._advance()
            if report is not None:
                report(progress)
            if self.folder is not None and self.step % save_every == 0:
                self.save()
        self.seconds += time.perf_counter() - begin
        loss, accuracy = self.validate()
        result = TrainResult(
            self.config,
            sum(p.numel() for p in self.model.parameters()),
            self.losses,
            loss,
            accuracy,
            evaluate(self.model, self.task),
            self.seconds,
        )
        if self.folder is not None:
            self.save()
            _write_text(self.folder / "result.json", json.dumps(result.to_dict(), indent=1))
        return result

    def _advance(self) -> Progress:
        rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self.task.sample(self.rng, self.config.batch)
        loss = loss_of(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise RosakitError(
                f"the loss is {value} at step {self.step + 1}; lower the learning rate "
                f"({self.config.learning_rate}) or set a gradient limit (clip)"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimiser.step()
        self.losses.append(value)
        return Progress(self.step, value, rate)

    def _learning_rate(self) -> float:
        low, high = self.config.final_learning_rate, self.config.learning_rate
        return low + (high - low) * (1 + math.cos(math.pi * self.step / self.config.steps)) / 2

    @torch.no_grad()
    def validate(self) -> tuple[float, Accuracy]:
        """Loss and accuracy by length on held-out sequences (the same ones in every run)."""
        self.model.eval()
        batch = self.task.sample(random.Random(20251014), HELD_OUT)
        loss = loss_of(self.model, batch).item()
        accuracy = by_length(self.model, batch, self.task)
        self.model.train()
        return loss, accuracy

    # --- saving and resuming --------------------------------------------------------------------

    def save(self) -> None:
        """Write weights and what resuming needs into the folder, each file atomically."""
        assert self.folder is not None
        save(self.model, self.folder / checkpoint.WEIGHTS)
        version, numbers, gauss = self.rng.getstate()
        state = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "optimiser": self.optimiser.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "rng": [version, list(numbers), gauss],
            "seconds": self.seconds,
        }
        try:
            atomic_write(self.folder / "trainer.pt", lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot save the run to {self.folder}: {error}") from error

    def _read_saved(self, resume: bool) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / "trainer.pt").exists():
            return None
        if not resume:
            raise CheckpointError(
                f"{self.folder} holds a run already; resume it (--resume) or choose another folder"
            )
        path = self.folder / "trainer.pt"
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
            theirs = json.loads(saved["config"])
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise CheckpointError(
                f"{path} cannot be read, the run cannot resume: {error}"
            ) from None
        ours = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            was = ", ".join(f"{key}={theirs.get(key)!r}" for key in changed)
            raise CheckpointError(
                f"{self.folder} holds a run with {was}; resume with the same options or choose "
                "another folder"
            )
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(saved["optimiser"])
        self.losses = saved["losses"].tolist()
        version, numbers, gauss = saved["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.seconds = saved["seconds"]


def loss_of(model: RosaModel, batch: Batch) -> torch.Tensor:
    """Mean cross entropy (nats) of the counted predictions."""
    device = next(model.parameters()).device
    tokens, counted = batch.tokens.to(device), batch.counted.to(device)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits[counted].float(), tokens[:, 1:][counted])


def _write_text(path: Path, text: str) -> None:
    try:
        atomic_write(path, text + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
