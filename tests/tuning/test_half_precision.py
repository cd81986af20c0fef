"""float16 with scaled losses (GPU) and compiled runs of `tune`: the losses of the plain run."""

from __future__ import annotations

import math

import pytest
import torch

from rosakit.tuning import RosaConfig
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, model, tokenizer

ROSA = RosaConfig(window=16, sink_tokens=2, layers=(1,), token_route=True, projection_rank=4)


def losses(output, **options):
    settings = {"length": 64, "steps": 6, "batch_size": 2, "rosa": ROSA, "log_every": 2, "seed": 1}
    config = TuneConfig(output=str(output), **{**settings, **options})
    plain = model()
    if config.device == "cuda":
        plain.to("cuda")
    return tune(config, model=plain, tokenizer=tokenizer(), documents=corpus(), show=False).losses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_compiled_run_has_the_losses_of_the_eager_one(tmp_path):
    options = {"steps": 3, "device": "cuda", "dtype": "float32", "precision": "float32"}
    eager = losses(tmp_path / "eager", **options)
    compiled = losses(tmp_path / "compiled", compile=True, **options)
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
