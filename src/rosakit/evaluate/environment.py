"""Where a result was measured: hardware, versions, date and commit."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Environment", "describe_environment"]

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "gguf")


@dataclass(frozen=True)
class Environment:
    """Facts that a reader needs to judge or repeat a measurement.

    Attributes:
        hardware: "cpu", "cores" (those this process may use), "threads" (of torch), "memory_gib",
            "gpu" (name or None).
        versions: of Python, rosakit and the packages that compute.
        date: UTC, ISO 8601, to the second.
        commit: of the source tree, with "+changes" if it was modified; None outside a checkout.
    """

    hardware: dict[str, str | int | float | None]
    versions: dict[str, str]
    date: str
    commit: str | None


def describe_environment() -> Environment:
    """Look at this machine, this interpreter and this source tree."""
    return Environment(_hardware(), _versions(), _now(), _commit())


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def _hardware() -> dict[str, str | int | float | None]:
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    from rosakit import __version__

    found = {"python": platform.python_version(), "rosakit": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository: only a tracked file counts.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.SubprocessError):
        return None
