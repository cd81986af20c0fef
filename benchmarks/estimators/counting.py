"""(d) RWKV-8's counting demo with every estimator: next-token loss on consecutive integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.estimators.variants import VARIANTS
from rosakit.models.rwkv8.training import Progress, TrainConfig, Trainer


def run(
    variant: str,
    seed: int,
    *,
    steps: int,
    batch: int,
    device: str,
    after_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train the one-layer model of the demo; `control` is its token memory alone."""
    chosen = VARIANTS[variant]
    config = TrainConfig(
        task="count",
        estimator=chosen.estimator,
        estimator_options=dict(chosen.options),
        layers=1 if chosen.retrieve else 0,
        steps=steps,
        batch=batch,
        seed=seed,
        device=device,
    )
    trainer = Trainer(config)

    def schedule(step: int) -> None:
        moved = {n: s.at(step, steps) for n, s in chosen.schedules.items()}
        if moved:
            trainer.model.use_estimator(chosen.estimator, {**chosen.options, **moved})

    def report(progress: Progress) -> None:
        if after_step is not None:
            after_step()
        if progress.step < steps:
            schedule(progress.step)
        elif chosen.estimator.startswith("soft"):  # what is read off is the hard forward
            trainer.model.use_estimator(chosen.estimator, {**chosen.options, "tau": None})

    schedule(0)
    result = trainer.run(report)
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "loss": result.final_loss,
        "held_out_loss": result.validation_loss,
        "losses_per_20_steps": [
            round(sum(x) / len(x), 4)
            for x in (result.losses[n : n + 20] for n in range(0, steps, 20))
        ],
        "seconds": round(result.seconds, 2),
    }
