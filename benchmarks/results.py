"""What every result file says about where it comes from, and how sections are merged into one."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import rosakit
from rosakit.files import atomic_write


def facts() -> dict[str, Any]:
    """Hardware, versions, date, commit and command of this run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "hardware": [
            *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
            f"{len(os.sched_getaffinity(0))} CPU cores",
        ],
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "commit": commit or os.environ.get("ROSAKIT_COMMIT", "unknown"),
        "command": command(sys.argv[1:]),
    }


def command(arguments: list[str]) -> str:
    """How this program was started: as the module that it is, or as the file that was named."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        each = ["--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        program = ["-m", "torch.distributed.run", *each, *program]
    return shlex.join(["python", *program, *arguments])


def merge(path: Path, section: str, values: dict[str, Any]) -> None:
    """Replace one section of a JSON file, keeping the others."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        found = {}
    found[section] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found, indent=1) + "\n")
