"""Data-parallel training: two processes take the steps that one would, and share a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rosakit.tuning import RosaConfig, attach, rosa_parameters
from rosakit.tuning.loss import LossModel
from rosakit.tuning.result import set_trainable
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.trainer import RosaTrainer, last_checkpoint, verify_checkpoint
from tests.tuning.texts import model
from tests.tuning.tiny import tokens

ROUTE = RosaConfig(window=16, sink_tokens=2, adapters=False, token_route=True)


def train(output: str, processes: int) -> dict[str, list[float]]:
    """Two steps on rows whose numbers of labels differ, two rows a step."""
    found = attach(model(), ROUTE)
    set_trainable(found)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in rosa_parameters(found).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = [
        {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(24)}
        for ids in tokens(4, 24)
    ]
    for block, labels in zip(blocks, (3, 24, 10, 24), strict=True):
        block["labels"][labels:] = -100
    config = TuneConfig(
        output=output,
        rosa=ROUTE,
        device="cpu",
        steps=2,
        batch_size=2 // processes,
        warmup=0.0,
        log_every=1,
        save_every=1,
    )
    trainer = RosaTrainer(
        LossModel(found, None),
        config,
        steps=2,
        train_blocks=blocks,
        eval_blocks=blocks,
        identity={},
        callbacks=[],
    )
    trainer.train()
    heldout = trainer.evaluate()["eval_loss"]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"losses": trainer.losses, "grad_norm": norms, "heldout": [heldout]}


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    subprocess.run(
        [*launch, __file__, str(tmp_path / "two")],
        check=True,
        capture_output=True,
        timeout=300,
        env=environment,
    )
    found = json.loads((tmp_path / "two/found.json").read_text())
    for name, values in train(str(tmp_path / "one"), 1).items():
        assert found[name] == pytest.approx(values, rel=1e-5), name
    checkpoint = last_checkpoint(tmp_path / "two")
    assert checkpoint.name == "checkpoint-2"
    verify_checkpoint(checkpoint)
    sealed = json.loads((checkpoint / "seal.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()


if __name__ == "__main__":
    result = train(sys.argv[1], 2)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "found.json").write_text(json.dumps(result))
