"""What `rosakit info` reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

__all__ = ["collect", "show"]

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
