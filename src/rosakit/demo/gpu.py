"""The longer recipe for a GPU: LoRA and token route, through the library's own training runs."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path

from rich.console import Console

from rosakit.demo.assets import fetch_model
from rosakit.demo.texts import standard_library
from rosakit.errors import InvalidInputError
from rosakit.evaluate import EvaluationResult
from rosakit.evaluate.progress import showing
from rosakit.evaluate.runs import evaluate_runs
from rosakit.tuning import RosaConfig
from rosakit.tuning.data import DataConfig
from rosakit.tuning.result import read_run
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from rosakit.tuning.trainer import last_checkpoint

__all__ = ["run_gpu"]

_TOKENS = 4_000_000
_LENGTH = 4096
_WINDOW = 256


def run_gpu(cache: Path, output: Path, seed: int, console: Console) -> EvaluationResult:
    """Train three runs alike (token route and LoRA; LoRA alone; LoRA with full attention), measure.

    Text: the standard library and the source of the installed torch and transformers; files are
    held out by the hash of their text. An interrupted run goes on from its last checkpoint.

    Raises:
        InvalidInputError: no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise InvalidInputError("--gpu needs a CUDA device and torch sees none; leave it out")
    model = str(fetch_model(cache, console.print))
    site = Path(sysconfig.get_paths()["purelib"])
    sources = tuple(
        str(site / name) for name in ("torch", "transformers") if (site / name).is_dir()
    )
    library = cache / "standard-library"
    for document in standard_library():
        path = library / document.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document.text, encoding="utf-8")
    rosa = RosaConfig(
        window=_WINDOW, sink_tokens=4, adapters=False, token_route=True, token_candidates=8
    )
    base = TuneConfig(
        model=model,
        data=DataConfig(sources=(str(library), *sources), extensions=(".py",), heldout_share=0.02),
        rosa=rosa,
        output=str(output / "rosa"),
        length=_LENGTH,
        tokens=_TOKENS,
        batch_size=8,
        lora_rank=16,
        lr_lora=5e-4,
        seed=seed,
        device="cuda",
        log_every=10,
        save_every=50,
    )
    runs = {
        "rosa": base,
        "control": dataclasses.replace(base, control=True, output=str(output / "control")),
        "full+trained": dataclasses.replace(
            base, rosa=dataclasses.replace(rosa, window=None), output=str(output / "full+trained")
        ),
    }
    for name, config in runs.items():
        folder = Path(config.output)
        if _finished(folder, config):
            console.print(f"{name}: trained already ({folder})")
            continue
        console.print(f"{name}: training on {_TOKENS:,} tokens")
        resume = last_checkpoint(folder) is not None
        if tune(dataclasses.replace(config, resume=resume)).interrupted:
            raise KeyboardInterrupt
    with showing(console) as progress:
        return evaluate_runs(
            output / "rosa",
            control=output / "control",
            full=output / "full+trained",
            length=_LENGTH,
            documents=48,
            niah_lengths=(512, 1024, 2048, 4096),
            samples=4,
            seed=seed,
            progress=progress,
        )


def _finished(folder: Path, config: TuneConfig) -> bool:
    """Whether a folder holds the complete result of this very run."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    whole = bool(metrics["steps"] == metrics["steps_planned"])
    return whole and dataclasses.replace(read_run(folder), resume=False) == config
