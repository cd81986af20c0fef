"""What `rosakit info` reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rosakit.tuning.memory import CacheMemory

__all__ = ["collect", "planned", "show"]

_PACKAGES = (
    *("rosakit", "torch", "numpy", "transformers", "peft", "accelerate", "datasets"),
    *("safetensors", "gguf", "lm-eval", "triton", "cuda-bindings"),
)


def collect() -> dict[str, Any]:
    """Versions, backends, threads and GPUs as plain values."""
    import torch

    import rosakit
    from rosakit import cuda, native

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    versions["rosakit"] = rosakit.__version__
    compiled = native.available()
    return {
        "versions": versions,
        "backends": {
            "oracle": "available (quadratic reference)",
            "cpu": "available" if compiled else "missing: the C++ core is not built",
            "cuda": "available" if cuda.available() else "missing",
        },
        "threads": {
            "cores for this process": len(os.sched_getaffinity(0)),
            "torch": torch.get_num_threads(),
            "rosakit": native.num_threads() if compiled else 0,
        },
        "gpu": [
            f"{torch.cuda.get_device_name(i)}, "
            f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            for i in range(torch.cuda.device_count())
        ],
    }


def planned(name: str, context: int, batch: int, base: str | None) -> CacheMemory:
    """Memory of decoding with a training result; see `rosakit.tuning.memory.plan_memory`."""
    from rosakit.errors import InvalidInputError
    from rosakit.tuning.memory import plan_memory
    from rosakit.tuning.result import read_run
    from rosakit.tuning.sources import load_model_config

    run = read_run(name)
    added = run.attached()
    if added is None:
        raise InvalidInputError(
            f"{name} was trained with full attention and without rosakit: its cache is the "
            "ordinary one"
        )
    model = load_model_config(run.model if base is None else base, run.gguf_file)
    return plan_memory(model, added, context, batch=batch)


def show(facts: dict[str, Any]) -> None:
    """Print the facts as aligned lines."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for title in ("versions", "backends", "threads"):
        for index, (name, value) in enumerate(facts[title].items()):
            table.add_row(title if index == 0 else "", name, str(value))
    for index, name in enumerate(facts["gpu"] or ["none"]):
        table.add_row("gpu" if index == 0 else "", name, "")
    Console(highlight=False).print(table)
