"""Shared fixtures: golden data where it is there, streams that automata find hard, NaN outputs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(
    os.environ.get("ROSAKIT_GOLDEN", Path(__file__).parents[1].parent / "shared" / "golden")
)

torch.set_num_threads(1)  # on tiny tensors more threads only wait for each other


@pytest.fixture(scope="session")
def golden():
    """Loader of reference vectors of official ROSA; skips, saying so, where they are missing."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"golden vectors not found at {path}; set ROSAKIT_GOLDEN to their folder")
        with np.load(path) as data:
            return dict(data)

    return load


@pytest.fixture(autouse=True)
def fill_empty_with_nan(monkeypatch):
    """What is allocated without a value holds NaN or garbage, so unwritten outputs show."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            if type(out) is torch.Tensor and out.device.type != "meta":
                if out.is_floating_point():
                    out.detach().fill_(float("nan"))
                elif out.dtype in (torch.uint8, torch.int16, torch.int32):
                    out.fill_(torch.iinfo(out.dtype).max)
            return out

        return made

    def poison_array(*args, **kwargs):
        out = make_array(*args, **kwargs)
        if out.dtype.kind in "iu":
            out.fill(np.iinfo(out.dtype).max)
        return out

    make_array = np.empty
    monkeypatch.setattr(np, "empty", poison_array)
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
