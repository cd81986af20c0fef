"""What several processes mean for a run: how many there are, and what they may not split."""

from __future__ import annotations

import os
from typing import Any

from rosakit.errors import UnsupportedModelError

__all__ = [
    "check_launch",
    "check_parallelism",
    "deepspeed_launched",
    "first_process",
    "processes",
]

_SPLITS = {
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
    "tp_size": "tensor parallelism",
}


def processes() -> int:
    """Processes that a launcher (accelerate, torchrun, deepspeed) started for this run."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def first_process() -> bool:
    """Whether this is the one of them that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def deepspeed_launched() -> bool:
    """Whether accelerate's launcher asked for DeepSpeed."""
    return _asked("ACCELERATE_USE_DEEPSPEED")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def check_launch(accelerator: Any) -> None:
    """Refuse a launch with DeepSpeed or FSDP that runs without it.

    accelerate leaves them out without a word where the CPU is asked for: every process would hold
    the whole model and all of the optimizer's state.

    Raises:
        UnsupportedModelError: what was asked for is not what runs.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if deepspeed_launched() and kind != "DEEPSPEED":
        raise UnsupportedModelError(
            f"the launch asks for DeepSpeed, but accelerate set up {kind}; leave out --cpu, "
            "use_cpu and ACCELERATE_USE_CPU, or launch with another configuration"
        )
    # A single process has nothing to shard.
    if _asked("ACCELERATE_USE_FSDP") and kind not in ("FSDP", "NO"):
        raise UnsupportedModelError(
            f"the launch asks for FSDP, but accelerate set up {kind}: it shards on GPUs only. "
            "Launch on GPUs, or with torchrun or configs/accelerate/ddp.yaml"
        )


def check_parallelism(accelerator: Any) -> None:
    """Refuse what splits a sequence or a layer over processes.

    A suffix match reads the symbols of the whole sequence; a process that holds a part of it would
    match within that part only, and nothing would show it.

    Raises:
        UnsupportedModelError: context, sequence or tensor parallelism is on.
    """
    config = getattr(accelerator, "parallelism_config", None)
    for name, what in _SPLITS.items():
        size = getattr(config, name, None) or 1
        if size > 1:
            raise UnsupportedModelError(
                f"{what} ({name}={size}) is not supported: a suffix match needs the whole "
                "sequence and every route of a layer in one process. Use data parallelism (DDP), "
                "FSDP or DeepSpeed ZeRO, and gradient checkpointing for longer sequences"
            )
