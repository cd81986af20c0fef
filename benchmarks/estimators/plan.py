"""The trainings of the comparison in the order of their importance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from benchmarks.estimators.parts import LARGEST, PARTS, SMALLEST
from benchmarks.estimators.pool import Job

SEEDS = 3
_FLIPS = ("bitflip", "bitflip_sampled", "bitflip_inverse")


class Planned(NamedTuple):
    """One training: its part, and what runs it."""

    part: str
    job: Job

    @property
    def group(self) -> str:
        """The same for all its seeds; part, variant and a digest of everything else."""
        rest = {k: v for k, v in self.job[1].items() if k not in ("seed", "variant", "device")}
        digest = hashlib.sha256(json.dumps(plain(rest), sort_keys=True).encode()).hexdigest()
        return f"{self.part}-{self.job[1]['variant']}-{digest[:8]}"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.group}-s{self.job[1]['seed']}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them."""
    return {
        k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v  # type: ignore[arg-type]
        for k, v in values.items()
    }


def plan(device: str, small: bool = False, seeds: int = SEEDS) -> list[Planned]:
    """Every row of the tasks with all its seeds, then the sweeps."""
    runs = [
        Planned(part, job)
        for part in ("mqar", "synonyms", "count", "fit")
        for job in PARTS[part](None, seeds, device, small)
    ]
    return sorted(runs, key=_rank)  # stable: parts keep their order within a rank


def _rank(run: Planned) -> tuple[int, int]:
    arguments = run.job[1]
    variant, seed = arguments["variant"], arguments["seed"]
    if run.part == "fit":  # seconds on a CPU
        return (6, seed)
    if run.part != "mqar":
        return (0, seed)
    task = arguments["task"]
    if task == LARGEST:
        # A sweep of all flips takes the GPU for itself: one of these costs as much as ten others.
        return (0, seed) if variant not in _FLIPS else (1 + (variant == "bitflip_inverse"), seed)
    if task.random_filler or task == SMALLEST:
        return (3 + (variant in _FLIPS), seed)
    return (5, seed)
