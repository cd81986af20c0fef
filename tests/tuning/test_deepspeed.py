"""DeepSpeed ZeRO by the ready configurations: two processes take the steps of one.

On a machine without a GPU the processes talk through gloo and compute in float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rosakit.errors import UnsupportedModelError
from rosakit.tuning import RosaConfig
from rosakit.tuning.parallel import check_launch
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import TuneResult, tune
from tests.tuning.texts import corpus, model, tokenizer

ROOT = Path(__file__).parents[2]
ROSA = RosaConfig(window=16, sink_tokens=2, layers=(1,), token_route=True, projection_rank=4)
GPU = torch.cuda.device_count() > 1
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def train(output: Path, processes: int, **options: object) -> TuneResult:
    """Four steps of two rows of the same texts."""
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
    return tune(config, model=plain, tokenizer=tokenizer(), documents=corpus(), show=False)


def launched(configuration: Path, output: Path, *flags: str) -> dict[str, Any]:
    """`train` in two processes under a configuration; what the first one found."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(configuration)]
    command += ["--mixed_precision", "no", __file__, str(output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ROSAKIT_NUM_THREADS": "1"}
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not GPU:
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = json.loads((output / "found.json").read_text())
    assert found["engine"] == "DEEPSPEED"
    return found


def everything_sharded(folder: Path) -> Path:
    """ZeRO-3 that shards small parameters as well, like the large ones of a real model."""
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {"zero_optimization": zero, **dict.fromkeys(automatic, "auto")}
    (folder / "zero3.json").write_text(json.dumps({**values, "gradient_clipping": "auto"}))
    text = (ROOT / "configs/accelerate/zero3.yaml").read_text()
    kept = text[: text.index("mixed_precision")]
    own = f"deepspeed_config:\n  deepspeed_config_file: {folder / 'zero3.json'}\n"
    (folder / "zero3.yaml").write_text(kept + own + "  zero3_init_flag: false\n")
    return folder / "zero3.yaml"


@pytest.mark.slow
@pytest.mark.gpu
@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_take_the_steps_of_one(tmp_path, stage):
    found = launched(ROOT / f"configs/accelerate/{stage}.yaml", tmp_path / stage)
    same_run(found, tmp_path / stage, train(tmp_path / "one", 1))


@pytest.mark.slow
@pytest.mark.gpu
@NEEDS_DEEPSPEED
def test_sharded_parameters_and_a_second_stage(tmp_path):
    found = launched(everything_sharded(tmp_path), tmp_path / "two", "base_from")
    alone = train(tmp_path / "one", 1, base_from=0.5)
    assert found["sharded"] > 0
    assert found["trained"] == alone.metrics["parameters_trained"]
    same_run(found, tmp_path / "two", alone)


@pytest.mark.slow
@pytest.mark.gpu
@NEEDS_DEEPSPEED
def test_resumed_it_is_the_unbroken_run(tmp_path):
    configuration = ROOT / "configs/accelerate/zero2.yaml"
    whole = launched(configuration, tmp_path / "run")
    before = saved_tensors(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-4")
    again = launched(configuration, tmp_path / "run", "resume")
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    for name, tensor in saved_tensors(tmp_path / "run").items():
        torch.testing.assert_close(tensor, before[name], msg=name)


def test_a_launch_with_deepspeed_that_runs_without_it_is_refused(monkeypatch):
    """accelerate leaves DeepSpeed out without a word where it was told to use the CPU."""
    replicated = SimpleNamespace(distributed_type="MULTI_CPU")
    check_launch(replicated)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_launch(SimpleNamespace(distributed_type="DEEPSPEED"))
    with pytest.raises(UnsupportedModelError, match="DeepSpeed"):
        check_launch(replicated)


def same_run(found: dict[str, Any], folder: Path, alone: TuneResult) -> None:
    """Losses and all that was saved, which is whole: it loads in one process."""
    assert found["losses"] == pytest.approx(alone.losses, rel=1e-4)
    got, wanted = saved_tensors(folder), saved_tensors(alone.output)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-2, atol=2e-3, msg=name)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a result holds, by kind of file and name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        kind = file.name.partition("-")[0]  # an adapter's file is named after its content
        found |= {f"{kind}:{name}": t for name, t in load_file(file).items()}
    assert found
    return found


def main(output: Path, flags: Sequence[str]) -> None:
    if not GPU:
        import deepspeed

        # Its shared-memory collectives would be compiled first; gloo's need no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    options: dict[str, object] = {"resume": "resume" in flags}
    if "base_from" in flags:
        options["base_from"] = 0.5
    result = train(output, 2, **options)
    from accelerate import PartialState

    if PartialState().is_main_process:
        values = {
            "losses": result.losses,
            "engine": PartialState().distributed_type.value,
            "trained": result.metrics["parameters_trained"],
            # A process that holds a share of a parameter shows an empty tensor in its place.
            "sharded": sum(p.numel() == 0 for p in result.model.parameters()),
        }
        (output / "found.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
