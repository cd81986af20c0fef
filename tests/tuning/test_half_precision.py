"""Compiled runs of `tune`, and float16 with scaled losses (GPU): the losses of the plain run."""

from __future__ import annotations

import math

import pytest
import torch

from rosakit.tuning import RosaConfig
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, tokenizer
from tests.tuning.tiny import build

ROSA = RosaConfig(window=16, sink_tokens=2, layers=(0,), token_route=True, projection_rank=4)
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
)


def losses(output, *, depth=2, **options):
    settings = {"length": 64, "steps": 6, "batch_size": 2, "rosa": ROSA, "log_every": 2, "seed": 1}
    config = TuneConfig(output=str(output), **{**settings, **options})
    plain = build("llama", depth=depth)
    if config.device == "cuda":
        plain.to("cuda")
    return tune(config, model=plain, tokenizer=tokenizer(), documents=corpus(), show=False).losses


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)],
)
def test_a_compiled_run_has_the_losses_of_the_eager_one(tmp_path, device):
    # One layer and two steps: nearly all of the time is the compiler's.
    options = {"steps": 2, "device": device, "dtype": "float32", "precision": "float32"}
    eager = losses(tmp_path / "eager", depth=1, **options)
    compiled = losses(tmp_path / "compiled", depth=1, compile=True, **options)
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_scaled_half_precision_follows_single_precision(tmp_path, precision):
    options = {"device": "cuda", "dtype": "float32"}
    single = losses(tmp_path / "single", precision="float32", **options)
    half = losses(tmp_path / "half", precision=precision, **options)
    assert all(map(math.isfinite, half))
    assert half == pytest.approx(single, rel=3e-2)
