"""`RosaTrainer`: transformers' Trainer with our loss, parameter groups and checkpoints.

A checkpoint is written into a staging folder, sealed with the SHA-256 of each of its files, and
renamed into place: a folder named ``checkpoint-N`` is complete, whenever the process died. It
holds only what is trained (adapters, token route, LoRA), the optimizer, the schedule, the state of
the random number generators and the loss of each step so far.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.files import atomic_write, sync
from rosakit.tuning.attach import adapters_of, is_attached, rosa_parameters
from rosakit.tuning.lora import lora_parameters
from rosakit.tuning.loss import LossModel
from rosakit.tuning.packing import collate
from rosakit.tuning.result import load_trained, save_trained
from rosakit.tuning.settings import TuneConfig

__all__ = ["RosaTrainer", "StopCallback", "last_checkpoint", "verify_checkpoint"]

_SEAL, _LOSSES = "seal.json", "losses.json"
_STAGING = ".partial"


class RosaTrainer(Trainer):  # type: ignore[misc]
    """Trainer of a `LossModel`.

    Args:
        model: the model with its loss; exactly its trainable parameters are optimised and stored.
        config: the run.
        steps: optimizer steps in total.
        train_blocks, eval_blocks: data sets of equally long blocks, in the order of use.
        identity: what a checkpoint must agree on to be resumed (see `verify_checkpoint`).
        callbacks: further callbacks.

    Attributes:
        losses: training loss of each step so far, in nats a token.
    """

    def __init__(
        self,
        model: LossModel,
        config: TuneConfig,
        *,
        steps: int,
        train_blocks: Dataset[dict[str, Tensor]],
        eval_blocks: Dataset[dict[str, Tensor]] | None,
        identity: dict[str, Any],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.config, self.identity = config, identity
        self.losses: list[float] = []
        self._pending: list[Tensor] = []
        self._staging = False
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self._heldout: list[tuple[Tensor, Tensor]] = []
        device = next(model.parameters()).device
        arguments = TrainingArguments(
            output_dir=str(Path(config.output) / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            max_grad_norm=config.max_grad_norm,
            warmup_steps=round(config.warmup * steps),
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(
                config.schedule, config.schedule
            ),
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_every or steps,
            eval_strategy="steps" if config.eval_every and eval_blocks is not None else "no",
            eval_steps=config.eval_every or None,
            seed=config.seed,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            prediction_loss_only=True,
        )
        if device.type == "cuda" and arguments.world_size == 1:
            # One process trains on one GPU; several processes are the launcher's business.
            arguments._n_gpu = 1
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=train_blocks,
            eval_dataset=eval_blocks,
            callbacks=[_Observe(self), *callbacks],
        )
        self.pop_callback(_printer())
        self.model_accepts_loss_kwargs = True

    # Loss.

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        out = model(**inputs, num_items=num_items_in_batch)
        loss = out["loss"]
        if num_items_in_batch is not None:
            # The number of labels is that of all processes, over which gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._pending.append(loss)
        return loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            loss, out = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self._heldout.append((loss.double() * out["tokens"], out["tokens"]))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's, with the mean loss over tokens instead of over batches."""
        self._heldout.clear()
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._heldout:
            sums = torch.stack([torch.stack([a, b.double()]) for a, b in self._heldout]).sum(0)
            total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            found.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1.0)
        return found

    @property
    def seconds(self) -> float:
        """Time spent training, over all continuations."""
        return self._seconds_before + time.perf_counter() - self._began

    def drain(self) -> None:
        """Turn the losses of finished forward passes into losses of steps."""
        count = self.args.gradient_accumulation_steps
        if not self._pending:
            return
        values = self.accelerator.reduce(torch.stack(self._pending), reduction="mean").tolist()
        self._pending.clear()
        for begin in range(0, len(values), count):
            self.losses.append(sum(values[begin : begin + count]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.drain()
            if not math.isfinite(logs["loss"]):
                raise InvalidInputError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower the "
                    "learning rates, or use dtype float32, and start from an earlier checkpoint"
                )
            logs |= self.accelerator.unwrap_model(self.model).health
        super().log(logs, start_time)

    # Order and rates.

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # Blocks come in their seeded order, so that the data position is the number of steps.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if optimizer is None:
            inner = self.accelerator.unwrap_model(self.model).model
            optimizer = torch.optim.AdamW(
                parameter_groups(inner, self.config), betas=(0.9, 0.99), eps=1e-8
            )
            self.optimizer = optimizer
        return optimizer

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, _STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.drain()
        self._staging = True
        root = Path(self.args.output_dir)
        try:
            if self.args.should_save:
                shutil.rmtree(root / _STAGING, ignore_errors=True)
            # Every process writes its random state into the folder that one of them seals.
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            name = f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                _seal(root / _STAGING / name)
                shutil.rmtree(root / name, ignore_errors=True)
                os.replace(root / _STAGING / name, root / name)
                sync(root)
                shutil.rmtree(root / _STAGING, ignore_errors=True)
                for _, old in _checkpoints(root)[: -self.config.keep_checkpoints]:
                    shutil.rmtree(old, ignore_errors=True)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its container format.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            shutil.rmtree(root / _STAGING, ignore_errors=True)
            reason = getattr(error, "strerror", None) or "the file system took no more data"
            raise CheckpointError(
                f"cannot save a checkpoint to {root}: {reason}. Free some space or choose another "
                "output; earlier checkpoints are unchanged, go on with resume"
            ) from error
        finally:
            self._staging = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model).model, folder, self.config)
        values = {"losses": self.losses, "seconds": self.seconds, "identity": self.identity}
        atomic_write(folder / _LOSSES, json.dumps(values) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        verify_checkpoint(folder, self.identity)
        inner = self.accelerator.unwrap_model(self.model if model is None else model).model
        load_trained(inner, folder, self.config)
        values = json.loads((folder / _LOSSES).read_text())
        self.losses = list(values["losses"])
        self._seconds_before = float(values.get("seconds", 0.0))


class _Observe(TrainerCallback):  # type: ignore[misc]
    """Asks the model for health metrics in the steps that are logged."""

    def __init__(self, trainer: RosaTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.observe = step % args.logging_steps == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Held-out passes that follow must not replace the training step's metrics.
        self.trainer.accelerator.unwrap_model(self.trainer.model).observe = False


class StopCallback(TrainerCallback):  # type: ignore[misc]
    """Stops after the running step, with a checkpoint, once `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def parameter_groups(model: Any, config: TuneConfig) -> list[dict[str, Any]]:
    """Trainable parameters with their learning rates; weight decay for matrices only."""
    named: list[tuple[str, Tensor, float]] = []
    if is_attached(model):
        addressing = {
            id(p)
            for adapter in adapters_of(model).values()
            for projection in (adapter.q_proj, adapter.k_proj)
            if projection is not None
            for p in projection.parameters()
        }
        for name, p in rosa_parameters(model).items():
            rate = config.lr
            if name.startswith("token_route."):
                rate = config.lr_token_route
            elif id(p) in addressing:
                rate *= config.qk_lr_scale
            named.append((name, p, rate))
    named += [(name, p, config.lr_lora) for name, p in lora_parameters(model).items()]
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter, rate in named:
        matrix = parameter.dim() >= 2 and not name.startswith("token_route.")
        groups.setdefault((rate, config.weight_decay if matrix else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def last_checkpoint(output: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = _checkpoints(Path(output) / "checkpoints")
    return found[-1][1] if found else None


def verify_checkpoint(folder: Path, identity: dict[str, Any] | None = None) -> None:
    """Check a checkpoint's files, and that it belongs to the run that wants to go on.

    Args:
        folder: a folder ``checkpoint-N``.
        identity: configuration and data digest of the run; None leaves that out.

    Raises:
        CheckpointError: incomplete, corrupt, or of another run.
    """
    remedy = "delete it to go on from the one before, or start again without resume"
    try:
        sealed = json.loads((folder / _SEAL).read_text())
        for name, digest in sealed.items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is corrupt; {remedy}")
        saved = json.loads((folder / _LOSSES).read_text())["identity"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is incomplete or corrupt ({error}); {remedy}") from error
    if identity is not None and saved != identity:
        names = sorted(n for n in {*saved, *identity} if saved.get(n) != identity.get(n))
        raise CheckpointError(
            f"{folder} belongs to a run with other {', '.join(names)}; resume with the same "
            "configuration and data, or train into another output folder"
        )


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints by step, oldest first."""
    found = []
    for path in root.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return sorted(found)


def _seal(folder: Path) -> None:
    """Write all files through to the disk and record their digests."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = _digest(path)
            sync(path)
    atomic_write(folder / _SEAL, json.dumps(digests, indent=1) + "\n")
    sync(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    found: type[TrainerCallback] = PrinterCallback
    return found
