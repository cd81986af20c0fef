"""`RosaTrainer`: transformers' Trainer with our loss, parameter groups and checkpoints.

A checkpoint holds what is trained (adapters, token route, LoRA; the base in the second stage), the
optimizer, the schedule, the state of callbacks and random number generators, and the loss of each
step so far. One process or many, whole or sharded (FSDP, ZeRO): it is always whole tensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.files import atomic_write, sync
from rosakit.tuning.checkpoint import fingerprint
from rosakit.tuning.loss import LossModel
from rosakit.tuning.packing import collate
from rosakit.tuning.parallel import check_launch, check_parallelism, deepspeed_launched
from rosakit.tuning.result import load_trained, save_trained
from rosakit.tuning.sealed import LOSSES, checkpoints, last_checkpoint, seal, verify_checkpoint
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.stages import TwoStages, innermost, learning_rates, parameter_groups

__all__ = ["RosaTrainer", "StopCallback", "last_checkpoint", "verify_checkpoint"]

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
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if device.type == "cuda" else "float32"
        arguments = TrainingArguments(
            output_dir=str(Path(config.output) / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            max_grad_norm=config.max_grad_norm,
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_every or steps,
            eval_strategy="steps" if config.eval_every and eval_blocks is not None else "no",
            eval_steps=config.eval_every or None,
            seed=config.seed,
            # With use_cpu accelerate would leave DeepSpeed out without a word.
            use_cpu=device.type == "cpu" and not deepspeed_launched(),
            # And without a GPU it would start it without a backend, each process alone.
            ddp_backend="gloo" if device.type == "cpu" and deepspeed_launched() else None,
            disable_tqdm=True,
            report_to=list(config.report_to) or "none",
            bf16=precision == "bfloat16",
            fp16=precision == "float16",
            torch_compile=config.compile,
            metric_for_best_model="loss" if config.patience else None,
            greater_is_better=False if config.patience else None,
            restore_callback_states_from_checkpoint=True,
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
            callbacks=[_Observe(self), *_built_in(config), *callbacks],
        )
        check_launch(self.accelerator)
        check_parallelism(self.accelerator)
        # The base's weights are whole here; sharded over processes they have no digest.
        self.base_model = None if config.base_from is not None else fingerprint(model.model)
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
    def loss_model(self) -> LossModel:
        """The model with its loss, out of whatever wraps it."""
        found: LossModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return found

    @property
    def evaluated(self) -> bool:
        """Whether the held-out loss was measured after the last step."""
        step = self.state.global_step
        return any(
            entry["step"] == step for entry in self.state.log_history if "eval_loss" in entry
        )

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
            logs |= self.loss_model.health
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TwoStages):
                    logs["stage"] = callback.stage
        super().log(logs, start_time)

    # Order and rates.

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # Blocks come in their seeded order, so that the data position is the number of steps.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if optimizer is None:
            groups = parameter_groups(self.loss_model.model, self.config)
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-8)
            self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            scheduler = learning_rates(innermost(optimizer), self.config, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = scheduler, True
        return scheduler

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
            # The Trainer noted it in the staging folder, which is gone when a run is resumed; only
            # the best loss and its step matter here, for patience.
            self.state.best_model_checkpoint = None
            if self.args.should_save:
                self.state.save_to_json(str(root / _STAGING / name / TRAINER_STATE_NAME))
                seal(root / _STAGING / name)
                shutil.rmtree(root / name, ignore_errors=True)
                os.replace(root / _STAGING / name, root / name)
                sync(root)
                shutil.rmtree(root / _STAGING, ignore_errors=True)
                for _, old in checkpoints(root)[: -self.config.keep_checkpoints]:
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
        save_trained(
            self.loss_model.model,
            folder,
            self.config,
            tensors=None if state_dict is None else _inner_names(state_dict),
            base_model=self.base_model,
        )
        values = {"losses": self.losses, "seconds": self.seconds, "identity": self.identity}
        atomic_write(folder / LOSSES, json.dumps(values) + "\n")

    def full_tensors(self) -> dict[str, Tensor] | None:
        """All parameters by their name in the language model where they are sharded, else None.

        Every process must call it; only the first one is sure to get the tensors (ZeRO-3 gives
        the others nothing).
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return _inner_names(self.accelerator.get_state_dict(self.model_wrapped) or {})

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """The Trainer's; what was trained is put back before the model is wrapped or sharded."""
        if resume_from_checkpoint:
            self._put_back(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: see `train`."""

    def _put_back(self, folder: Path) -> None:
        verify_checkpoint(folder, self.identity)
        load_trained(self.loss_model.model, folder, self.config)
        values = json.loads((folder / LOSSES).read_text())
        self.losses = list(values["losses"])
        self._seconds_before = float(values.get("seconds", 0.0))


class _Observe(TrainerCallback):  # type: ignore[misc]
    """Asks the model for health metrics in the steps that are logged."""

    def __init__(self, trainer: RosaTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        self.trainer.loss_model.observe = step % args.logging_steps == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Held-out passes that follow must not replace the training step's metrics.
        self.trainer.loss_model.observe = False


class StopCallback(TrainerCallback):  # type: ignore[misc]
    """Stops after the running step, with a checkpoint, once `asked` is set."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def _built_in(config: TuneConfig) -> list[TrainerCallback]:
    found: list[TrainerCallback] = []
    if config.base_from is not None:
        found.append(TwoStages(config.base_from))
    if config.patience:
        found.append(EarlyStoppingCallback(config.patience))
    return found


def _inner_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `LossModel` by their name in the model inside it."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    found: type[TrainerCallback] = PrinterCallback
    return found
