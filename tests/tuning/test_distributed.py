"""Two processes (gloo, CPU): gradients and steps of one, replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from rosakit.errors import UnsupportedModelError
from rosakit.tuning import RosaConfig, attach, rosa_parameters
from rosakit.tuning.base import base_parameters
from rosakit.tuning.checkpoint import fingerprint
from rosakit.tuning.loss import LossModel, find_head
from rosakit.tuning.parallel import check_launch, check_parallelism, first_process
from rosakit.tuning.result import load_trained, save_trained, set_trainable
from rosakit.tuning.settings import TuneConfig
from tests.tuning.texts import model
from tests.tuning.tiny import tokens

ROOT = Path(__file__).parents[2]
ROSA = RosaConfig(window=9, sink_tokens=2, own_value=True, token_route=True, unmatched="null")
CONFIG = TuneConfig(rosa=ROSA, base_from=0.5)


def build(everything: bool) -> LossModel:
    plain = model()
    head = find_head(plain)
    found = attach(plain, ROSA)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in rosa_parameters(found).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped = LossModel(found.train(), head)
    set_trainable(found, base=everything)
    return wrapped


def step(wrapped, ids, names):
    """Gradients and parameters after one step."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    optimizer.zero_grad()
    wrapped(input_ids=ids, labels=ids)["loss"].backward()
    inner = wrapped.module if hasattr(wrapped, "module") else wrapped
    found = {n: p for n, p in inner.named_parameters() if n in names}
    grads = {n: whole(p.grad) for n, p in found.items()}
    optimizer.step()
    return grads, {n: whole(p.data) for n, p in found.items()}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def shard(wrapped):
    """As accelerate does it for FSDP2: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in list(wrapped.modules()):
        if type(module).__name__ in wrapped._no_split_modules:
            fully_shard(module, reshard_after_forward=True)
    return fully_shard(wrapped)


def compare(name, got, wanted):
    for kind, one, other in zip(("gradient", "parameter"), got, wanted, strict=True):
        assert one.keys() == other.keys()
        for key, tensor in other.items():
            torch.testing.assert_close(
                one[key],
                tensor,
                atol=2e-6,
                rtol=1e-4,
                msg=lambda m, k=key, w=kind: f"{name} {w} {k}: {m}",
            )


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    ids = tokens(4, 40)
    mine = ids[rank::2]
    checked = []
    for everything in (False, True):
        alone = build(everything)
        names = {n for n, p in alone.named_parameters() if p.requires_grad}
        wanted = step(alone, ids, names)
        replicated = torch.nn.parallel.DistributedDataParallel(build(everything))
        compare("DDP", step(replicated, mine, names), wanted)
        sharded = shard(build(everything))
        assert {type(p).__name__ for p in sharded.parameters()} == {"DTensor"}
        compare("FSDP2", step(sharded, mine, names), wanted)
        checked.append(len(names))
    stages(ids, mine)
    saved(folder, sharded, alone, rank)
    observed(sharded, mine)
    if rank == 0:
        (folder / "checked.json").write_text(json.dumps(checked))
    distributed.destroy_process_group()


def stages(ids, mine):
    """Freezing the base for a while, as the first stage does, after sharding and replicating."""
    results = []
    for wrap in (
        lambda m: m,
        shard,
        lambda m: torch.nn.parallel.DistributedDataParallel(m, find_unused_parameters=True),
    ):
        wrapped = wrap(build(True))
        inner = wrapped.module if hasattr(wrapped, "module") else wrapped
        base = list(base_parameters(inner.model).values())
        data = ids if wrapped is inner and not results else mine
        for second in (False, True):
            for parameter in base:
                parameter.requires_grad_(second)
            names = {n for n, p in inner.named_parameters() if p.requires_grad}
            found = step(wrapped, data, names)
        results.append(found)
    compare("FSDP2 in its second stage", results[1], results[0])
    compare("DDP in its second stage", results[2], results[0])


def saved(folder, sharded, alone, rank):
    """Whole tensors out of shards, saved with the digest of the unsharded base."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(sharded, options=options)
    if rank == 0:
        tensors = {n.removeprefix("model."): t for n, t in state.items()}
        base = fingerprint(alone.model)
        save_trained(sharded.model, folder / "run", CONFIG, tensors=tensors, base_model=base)
        again = attach(model(), ROSA)
        load_trained(again, folder / "run", CONFIG)
        wanted = dict(alone.model.named_parameters())
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(parameter, wanted[name], atol=2e-6, rtol=1e-4)
    distributed.barrier()


def observed(sharded, ids):
    """Health of a sharded model: what needs whole parameters is left out."""
    sharded.observe = True
    sharded(input_ids=ids, labels=ids)
    assert sharded.health["match_rate"] > 0
    assert "hit_rate" in sharded.health


def test_replicated_and_sharded_give_the_gradients_of_one_process(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    added, everything = json.loads((tmp_path / "checked.json").read_text())
    assert everything > added > 10


def test_splitting_a_sequence_is_refused():
    for name, what in (("cp_size", "context"), ("sp_size", "sequence"), ("tp_size", "tensor")):
        accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**{name: 2}))
        with pytest.raises(UnsupportedModelError, match=rf"{what} parallelism \({name}=2\).*FSDP"):
            check_parallelism(accelerator)
    check_parallelism(SimpleNamespace(parallelism_config=None))
    check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=1)))


def test_a_launch_with_fsdp_that_runs_without_it_is_refused(monkeypatch):
    """accelerate shards on GPUs only, and replicates on a CPU without a word."""
    replicated = SimpleNamespace(distributed_type="MULTI_CPU")
    check_launch(replicated)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for kind in ("FSDP", "NO"):  # one process has nothing to shard
        check_launch(SimpleNamespace(distributed_type=kind))
    with pytest.raises(UnsupportedModelError, match="asks for FSDP, but accelerate set up MULTI_"):
        check_launch(replicated)


def test_only_the_first_process_speaks(monkeypatch):
    assert first_process()
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert first_process() == speaks


def test_ready_configurations_name_settings_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
    assert [f.stem for f in files] == ["ddp", "fsdp2", "zero2", "zero3"]
    kinds = {f.stem: str(load_config_from_file(str(f)).distributed_type) for f in files}
    assert "FSDP" in kinds["fsdp2"]
    assert "DEEPSPEED" in kinds["zero3"]
    assert "MULTI_GPU" in kinds["ddp"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
