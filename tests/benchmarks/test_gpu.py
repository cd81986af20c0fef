"""What of the GPU benchmarks can be tested without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rosakit import native

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other by plain names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("run", "streams", "window", "pipeline", "timeline", "decode"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("length, window", [(128, 128), (1024, 256), (512, 2048)])
def test_the_written_block_mask_is_the_window(length, window):
    from torch.nn.attention.flex_attention import create_block_mask
    from window import block_mask, windowed

    mine = block_mask(length, window, "cpu")
    right = create_block_mask(windowed(window), None, None, length, length, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mine, name), getattr(right, name)), name
    assert torch.equal(mine.to_dense(), right.to_dense())


def test_ratios_come_from_the_worst_verified_stream():
    import run

    rows = [
        {"T": 16384, "stream": "random", "forward_ms": 1.0, "counterfactual_ms": 2.0},
        {"T": 16384, "stream": "repeats", "forward_ms": 1.5, "counterfactual_ms": 2.49},
        {"T": 16384, "stream": "constant", "verified": False},
        {"T": 131072, "stream": "random", "forward_ms": 9.0},
    ]
    report = {"match": rows, "comparison": [], "growth": []}
    run.compare(report)
    (published,) = report["comparison"]
    assert published["times_faster"] == pytest.approx(100.0)
    assert report["growth"] == [{"stream": "random", "128k_over_16k": 9.0, "a_doubling": {}}]


@pytest.mark.skipif(not native.available(), reason="the compiled core is missing")
def test_the_pipeline_benchmark_runs_and_its_picture_is_drawn(monkeypatch, tmp_path):
    import timeline

    import pipeline

    monkeypatch.setattr(pipeline, "ROUTES", 16)
    out = tmp_path / "pipeline.json"
    arguments = ["x", "--device", "cpu", "--length", "64", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    pipeline.main()
    report = json.loads(out.read_text())
    assert all(row["verified"] for row in report["rows"])
    assert {row["flips"] for row in report["rows"]} == {0, 4}
    trace = tmp_path / "pipeline_trace.json"
    names = {event["name"] for event in json.loads(trace.read_text())}
    assert {"rosakit::submit", "rosakit::unpack", "rosakit::match", "rosakit::join"} <= names
    monkeypatch.setattr(sys, "argv", ["x", str(trace)])
    timeline.main()
    assert trace.with_suffix(".png").stat().st_size > 10000
