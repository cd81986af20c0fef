"""DeepSpeed ZeRO by the ready configurations: two processes take the steps of one.

On a machine without a GPU the processes talk through gloo and compute in float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rosakit.tuning import RosaConfig
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from tests.tuning.texts import corpus, model, tokenizer

ROOT = Path(__file__).parents[2]
ROSA = RosaConfig(window=16, sink_tokens=2, layers=(1,), token_route=True, projection_rank=4)
GPU = torch.cuda.device_count() > 1


def train(output: Path, processes: int, **options: object) -> list[float]:
    """Four steps of two rows of the same texts; the losses of the steps."""
    config = TuneConfig(
        output=str(output),
        rosa=ROSA,
        device="cuda" if GPU else "cpu",
        precision="float32",
        length=64,
        steps=4,
        batch_size=2 // processes,
        log_every=1,
        save_every=2,
        **options,
    )
    plain = model()
    if GPU:
        plain.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    found = tune(config, model=plain, tokenizer=tokenizer(), documents=corpus(), show=False)
    return found.losses


def launched(stage: str, output: Path, *flags: str) -> None:
    """`train` in two processes under one of the ready configurations."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"configs/accelerate/{stage}.yaml")]
    command += ["--mixed_precision", "no", __file__, str(output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ROSAKIT_NUM_THREADS": "1"}
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not GPU:
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
@pytest.mark.skipif(
    not GPU, reason="needs two GPUs: on the CPU DeepSpeed first compiles its own operators"
)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_take_the_steps_of_one(tmp_path, stage):
    launched(stage, tmp_path / stage)
    alone = train(tmp_path / "one", 1)
    found = json.loads((tmp_path / stage / "found.json").read_text())
    assert found == pytest.approx(alone, rel=1e-4)
    # What was saved is whole: it loads in one process, and is what one process learned.
    got, wanted = (saved_tensors(tmp_path / name) for name in (stage, "one"))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-2, atol=2e-3, msg=name)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a result holds."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": t for name, t in load_file(file).items()}
    assert found
    return found


if __name__ == "__main__":
    losses = train(Path(sys.argv[1]), 2)
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(losses))
