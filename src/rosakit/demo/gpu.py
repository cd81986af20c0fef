"""The longer recipe for a GPU: LoRA and token route, through the library's own training runs."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
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
from rosakit.tuning.result import located, read_run
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.train import tune
from rosakit.tuning.trainer import last_checkpoint

__all__ = ["LongRecipe", "run_gpu", "run_long"]


@dataclass(frozen=True)
class LongRecipe:
    """Sizes of the longer recipe. The defaults are for one data-centre GPU.

    Attributes:
        tokens: trained on, by each of the three runs.
        length: tokens of a sequence, in training and evaluation.
        window: of the windowed runs, tokens.
        batch_size: sequences a step.
        lora_rank: of LoRA on all linear layers.
        documents: held-out files measured.
        needle_lengths: of the needle prompts, tokens.
        needle_samples: needles at each length and depth.
        heldout_share: share of the files held out.
        device: where to compute.
    """

    tokens: int = 4_000_000
    length: int = 4096
    window: int = 256
    batch_size: int = 8
    lora_rank: int = 16
    documents: int = 48
    needle_lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    needle_samples: int = 4
    heldout_share: float = 0.02
    device: str = "cuda"


def run_gpu(cache: Path, output: Path, seed: int, console: Console) -> EvaluationResult:
    """Download the model, gather source code, and run the longer recipe on this GPU.

    Text: the standard library and the source of the installed torch and transformers; files are
    held out by the hash of their text.

    Raises:
        InvalidInputError: no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise InvalidInputError("--gpu needs a CUDA device and torch sees none; leave it out")
    model = str(fetch_model(cache, console.print))
    site = Path(sysconfig.get_paths()["purelib"])
    packages = [str(site / name) for name in ("torch", "transformers") if (site / name).is_dir()]
    library = cache / "standard-library"
    for document in standard_library():
        path = library / document.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document.text, encoding="utf-8")
    return run_long(LongRecipe(), model, (str(library), *packages), output, seed, console)


def run_long(
    recipe: LongRecipe,
    model: str,
    sources: Sequence[str],
    output: Path,
    seed: int,
    console: Console,
) -> EvaluationResult:
    """Train three runs alike (token route and LoRA; its control; with full attention), measure.

    A finished run is kept; an interrupted one goes on from its last checkpoint.

    Args:
        recipe: sizes.
        model: as `TuneConfig.model`.
        sources: folders of source code.
        output: folder of the runs and of the evaluation.
        seed: of everything random.
        console: where progress is shown.
    """
    rosa = RosaConfig(
        window=recipe.window, sink_tokens=4, adapters=False, token_route=True, token_candidates=8
    )
    base = TuneConfig(
        model=model,
        data=DataConfig(
            sources=tuple(sources), extensions=(".py",), heldout_share=recipe.heldout_share
        ),
        rosa=rosa,
        output=str(output / "rosa"),
        length=recipe.length,
        tokens=recipe.tokens,
        batch_size=recipe.batch_size,
        lora_rank=recipe.lora_rank,
        lr_lora=5e-4,
        seed=seed,
        device=recipe.device,
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
        console.print(f"{name}: training on {recipe.tokens:,} tokens")
        resume = last_checkpoint(folder) is not None
        if tune(dataclasses.replace(config, resume=resume)).interrupted:
            raise KeyboardInterrupt
    with showing(console) as progress:
        return evaluate_runs(
            output / "rosa",
            control=output / "control",
            full=output / "full+trained",
            length=recipe.length,
            documents=recipe.documents,
            niah_lengths=recipe.needle_lengths,
            samples=recipe.needle_samples,
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
    kept = dataclasses.replace(read_run(folder), resume=False)
    return whole and located(kept) == located(config)
