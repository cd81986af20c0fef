"""`tune()`: one call from a configuration to a trained result on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.files import atomic_write
from rosakit.tuning.attach import attach, is_attached
from rosakit.tuning.card import write_card
from rosakit.tuning.data import Documents, read_documents
from rosakit.tuning.lora import add_lora, lora_parameters
from rosakit.tuning.loss import LossModel, find_head
from rosakit.tuning.packing import PackedBlocks
from rosakit.tuning.parallel import first_process, processes
from rosakit.tuning.progress import LiveCallback, counting
from rosakit.tuning.result import located, save_trained, set_trainable
from rosakit.tuning.schedule_callback import ScheduleCallback
from rosakit.tuning.schedules import read_schedules
from rosakit.tuning.sealed import FREE
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.sources import load_model, locate
from rosakit.tuning.streamed import StreamedBlocks, held_out, sources_digest
from rosakit.tuning.teaching import AddressTeacher
from rosakit.tuning.trainer import RosaTrainer, StopCallback, last_checkpoint, verify_checkpoint

__all__ = ["TuneResult", "tune"]


@dataclass
class TuneResult:
    """What a training run produced.

    Attributes:
        output: the folder with adapter, configuration, metrics and model card.
        model: the trained model, attached.
        tokenizer: its tokenizer.
        steps: optimizer steps done so far, over all continuations.
        interrupted: stopped by a signal; `resume` goes on from the checkpoint that was left.
        losses: training loss of each step, in nats a token.
        metrics: what `metrics.json` holds.
    """

    output: Path
    model: Any
    tokenizer: Any
    steps: int
    interrupted: bool
    losses: list[float]
    metrics: dict[str, Any]


def tune(
    config: TuneConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    documents: Documents | None = None,
    show: bool = True,
) -> TuneResult:
    """Train adapters, token route and LoRA on a frozen model, and save what was trained.

    An interrupt (Ctrl-C, SIGTERM) ends the run after the running step with a checkpoint; a second
    one ends it at once.

    Args:
        config: the run.
        model: a loaded, plain model to train instead of loading ``config.model``; it is changed in
            place.
        tokenizer: its tokenizer.
        documents: texts to use instead of reading ``config.data``.
        show: print progress and health to standard error, in the first process.

    Returns:
        The result; its files are in ``config.output``.

    Raises:
        InvalidInputError: settings, model or output folder that cannot be used.
        DataError: data that cannot be read.
        CheckpointError: a checkpoint that cannot be written or resumed.
    """
    output, show = Path(config.output), show and first_process()
    checkpoint = _resumable(config)
    if documents is None:
        documents = _documents(config)
    if config.eval_every and not documents.heldout:
        raise InvalidInputError(
            "eval_every measures held-out text, and none was left out of this data; name some with "
            "heldout, raise heldout_share, or leave out eval_every and patience"
        )
    _check_reporters(config.report_to)
    if model is None:
        locate(config.model, config.gguf_file)  # a name that is none leaves no folder behind
    _make_folder(output)
    if model is None:
        model, tokenizer = load_model(
            config.model, gguf_file=config.gguf_file, dtype=_dtype(config), device=config.device
        )
    elif tokenizer is None:
        raise InvalidInputError("tune was given a model without its tokenizer; pass both")
    train_blocks, eval_blocks, steps = _blocks(config, documents, tokenizer, show)
    identity = _identity(config, documents)
    if checkpoint is not None:
        verify_checkpoint(checkpoint, identity)

    wrapped = _prepare(model, config)
    live = LiveCallback(_tokens_a_step(config), show)
    stop = StopCallback()
    callbacks = [live, stop]
    if config.estimator_schedules and config.rosa is not None:
        moved = read_schedules(config.rosa.estimator, config.estimator_schedules)
        callbacks.append(ScheduleCallback(moved))
    trainer = RosaTrainer(
        wrapped,
        config,
        steps=steps,
        train_blocks=train_blocks,
        eval_blocks=eval_blocks,
        identity=identity,
        callbacks=callbacks,
    )
    try:
        with _interruptible(stop):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.drain()
            if eval_blocks is not None and not stop.asked and not trainer.evaluated:
                trainer.evaluate()
    finally:
        live.close()
        model.eval()
    metrics = _metrics(trainer, model, config, documents, steps, trainer.seconds)
    interrupted = stop.asked and trainer.state.global_step < steps
    tensors = trainer.full_tensors()
    result = TuneResult(
        output, model, tokenizer, trainer.state.global_step, interrupted, trainer.losses, metrics
    )
    if trainer.is_world_process_zero():
        _save(result, config, tensors, trainer.base_model)
    return result


def _prepare(model: Any, config: TuneConfig) -> LossModel:
    """Add LoRA, adapters and token route to a plain model and freeze the rest."""
    if is_attached(model) or lora_parameters(model):
        raise InvalidInputError(
            f"tune needs a plain {type(model).__name__}, this one is attached or has LoRA already; "
            "load it afresh, or call rosakit.detach on it"
        )
    set_seed(config.seed)
    model.eval()
    head = find_head(model)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    attached = config.attached()
    if attached is not None:
        attach(model, attached)
    set_trainable(model, base=config.base_from is not None)
    if config.gradient_checkpointing:
        # Non-reentrant checkpointing needs no gradient at the embeddings, so layers below the
        # lowest trained one stay out of the backward pass.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = None
    if config.address_loss != "none" and not config.control:
        teacher = AddressTeacher(config.address_loss, config.address_samples)
    return LossModel(model, head, teacher=teacher, teacher_weight=config.address_weight)


def _resumable(config: TuneConfig) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        InvalidInputError: the folder holds a run already, and this one would overwrite it.
        CheckpointError: nothing to resume.
    """
    found = last_checkpoint(config.output)
    if config.resume:
        if found is None:
            raise CheckpointError(
                f"nothing to resume: {config.output} holds no complete checkpoint; leave out "
                "resume to start from the beginning"
            )
        verify_checkpoint(found)
        return found
    if found is not None:
        raise InvalidInputError(
            f"{config.output} already holds a run (with {found.name}); go on with resume, choose "
            "another output, or remove the folder"
        )
    return None


def _check_reporters(names: Sequence[str]) -> None:
    """Refuse a reporter that the Trainer does not know, or whose package is missing."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for reporter in get_reporting_integration_callbacks(list(names)):
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InvalidInputError(
            f"cannot report to {', '.join(names)}: {error}. Install its package, or leave out "
            "report_to"
        ) from error


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"cannot create the output folder {output}: {error.strerror}"
        ) from error


def _blocks(
    config: TuneConfig, documents: Documents, tokenizer: Any, show: bool
) -> tuple[PackedBlocks | StreamedBlocks, PackedBlocks | None, int]:
    """Training blocks, held-out blocks and the number of steps."""
    fixed = config.steps is not None or config.tokens is not None
    a_step = config.batch_size * config.accumulate * processes()
    if not documents.train:
        steps = config.total_steps(0, processes())
        streamed = StreamedBlocks(
            config.data, tokenizer, config.length, count=steps * a_step, seed=config.seed
        )
        return streamed, _heldout_blocks(config, documents, tokenizer), steps
    with counting("tokenising", show) as progress:
        train = PackedBlocks(
            documents.train,
            tokenizer,
            config.length,
            config.data,
            seed=config.seed,
            count=config.total_steps(0, processes()) * a_step if fixed else None,
            progress=progress,
        )
    steps = config.total_steps(len(train), processes())
    train.count = steps * a_step
    return train, _heldout_blocks(config, documents, tokenizer), steps


def _heldout_blocks(
    config: TuneConfig, documents: Documents, tokenizer: Any
) -> PackedBlocks | None:
    if not documents.heldout:
        return None
    # Held-out blocks are never augmented: they measure natural text.
    data = type(config.data)(sources=config.data.sources, isolate=config.data.isolate)
    heldout = PackedBlocks(
        documents.heldout,
        tokenizer,
        config.length,
        data,
        count=config.eval_blocks,
        shuffle=False,
        shrink=True,
    )
    heldout.count = min(heldout.count, len(heldout.blocks))
    return heldout


def _documents(config: TuneConfig) -> Documents:
    """The texts; of a stream only those that are measured on."""
    if not config.data.streaming:
        return read_documents(config.data)
    return Documents([], held_out(config.data, 8 * config.eval_blocks * config.length), 0)


def _identity(config: TuneConfig, documents: Documents) -> dict[str, Any]:
    """What two parts of one run have in common: all that decides its numbers."""
    values = {name: v for name, v in located(config).items() if name not in FREE}
    digest = hashlib.sha256()
    for document in documents.train:
        digest.update(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest())
    values["processes"] = processes()
    values["data_digest"] = digest.hexdigest()
    if not documents.train:
        values["data_digest"] = sources_digest(config.data)
    # As JSON reads it back: tuples become lists.
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def _metrics(
    trainer: RosaTrainer,
    model: Any,
    config: TuneConfig,
    documents: Documents,
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    import transformers

    import rosakit

    history = trainer.state.log_history
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    trained = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    return {
        "steps": trainer.state.global_step,
        "steps_planned": steps,
        "tokens": trainer.state.global_step * _tokens_a_step(config),
        "seconds": round(seconds, 2),
        "parameters_trained": sum(map(_numbers, trained)),
        "parameters": sum(map(_numbers, model.parameters())),
        "train_loss": _tail_mean(trainer.losses),
        "heldout_loss": evaluated[-1] if evaluated else None,
        "health": trainer.accelerator.unwrap_model(trainer.model).health,
        "documents": {
            "train": len(documents.train) or "streamed",
            "heldout": len(documents.heldout),
            "skipped": documents.skipped,
        },
        "losses": trainer.losses,
        "history": history,
        "seed": config.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {
            "rosakit": rosakit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _numbers(parameter: Tensor) -> int:
    """Numbers in a whole parameter; under ZeRO-3 the tensor at hand may be empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _tokens_a_step(config: TuneConfig) -> int:
    return config.batch_size * config.accumulate * config.length * processes()


def _tail_mean(losses: Sequence[float]) -> float | None:
    """Mean of the last tenth of the losses, which a single noisy step does not decide."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else None


def _dtype(config: TuneConfig) -> str:
    """Weights that learn are float32, or small steps of them are lost."""
    return "float32" if config.dtype == "auto" and config.base_from is not None else config.dtype


def _save(
    result: TuneResult,
    config: TuneConfig,
    tensors: dict[str, Tensor] | None,
    base_model: dict[str, Any] | None,
) -> None:
    try:
        save_trained(result.model, result.output, config, tensors=tensors, base_model=base_model)
        atomic_write(result.output / "metrics.json", json.dumps(result.metrics, indent=2) + "\n")
        write_card(result.output, config, result.metrics)
    except OSError as error:
        raise CheckpointError(
            f"cannot save the result to {result.output}: {error.strerror or error}. Free some "
            "space and run again with resume; the checkpoints are unchanged"
        ) from error


@contextmanager
def _interruptible(stop: StopCallback) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request to stop, the second into an interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
