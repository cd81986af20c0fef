"""What a run would do, without doing it: parameters, memory, steps and time.

The model is built without its weights (on the meta device), so a plan costs seconds for a model of
any size. Memory counts weights, gradients, optimizer state and the activations that are kept for
the backward pass; time follows from the arithmetic and from how fast this machine multiplies
matrices. Both are estimates: expect them within a factor of two.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rosakit.tuning.attach import attach, is_attached, rosa_parameters
from rosakit.tuning.lora import add_lora, lora_parameters
from rosakit.tuning.parallel import processes
from rosakit.tuning.result import set_trainable
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.sources import load_skeleton, load_tokenizer, pick_device, pick_dtype

__all__ = ["Plan", "plan_run"]

_EFFICIENCY = 0.4
"""Share of the speed of one large matrix product that a training step reaches."""


@dataclass
class Plan:
    """Numbers of a run that has not been made.

    Attributes:
        parameters: of the model with everything that is added.
        added: of adapters, token route and LoRA.
        trained: of what learns at some time.
        steps: optimizer steps.
        tokens_a_step: over all processes.
        tokens: in total.
        memory: bytes a process by what they are for.
        seconds: of the training, None where the speed of this machine says nothing.
        device: where it would run.
        processes: of the launcher.
    """

    parameters: int
    added: int
    trained: int
    steps: int
    tokens_a_step: int
    tokens: int
    memory: dict[str, int]
    seconds: float | None
    device: str
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The plan for people."""
        share = 100 * self.added / max(1, self.parameters - self.added)
        total = sum(self.memory.values())
        parts = ", ".join(f"{name} {_size(value)}" for name, value in self.memory.items())
        found = [
            f"parameters   {self.parameters:,}, of which {self.added:,} are added ({share:.2f}% "
            f"of the base); {self.trained:,} learn",
            f"steps        {self.steps:,} of {self.tokens_a_step:,} tokens each = "
            f"{self.tokens:,} tokens",
            f"memory       about {_size(total)} a process: {parts}",
            f"device       {self.device}, {self.processes} "
            f"process{'es' if self.processes > 1 else ''}",
        ]
        if self.seconds is not None:
            found.append(f"time         about {_time(self.seconds)}")
        return found


def plan_run(config: TuneConfig) -> Plan:
    """Plan a run: reads the model's configuration, and the texts where their number is needed.

    Raises:
        InvalidInputError: settings or a model that cannot be used.
        UnsupportedModelError: what is to be added does not fit the model.
        DataError: data that cannot be read.
    """
    device = pick_device(config.device)
    dtype = pick_dtype("float32" if config.base_from is not None else config.dtype, device)
    model = load_skeleton(config.model, gguf_file=config.gguf_file, dtype=dtype)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    attached = config.attached()
    if attached is not None:
        attach(model, attached)
    set_trainable(model, base=config.base_from is not None)
    steps = _steps(config)
    a_step = config.batch_size * config.accumulate * config.length * processes()
    trained = [p for p in model.parameters() if p.requires_grad]
    added = {**lora_parameters(model), **(rosa_parameters(model) if is_attached(model) else {})}
    plan = Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        added=sum(p.numel() for p in added.values()),
        trained=sum(p.numel() for p in trained),
        steps=steps,
        tokens_a_step=a_step,
        tokens=steps * a_step,
        memory=_memory(model, config, trained),
        seconds=None,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        processes=processes(),
    )
    speed = _matrix_speed(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    work = _operations_a_token(model, config) * plan.tokens / plan.processes
    plan.seconds = work / (speed * _EFFICIENCY)
    return plan


def _steps(config: TuneConfig) -> int:
    if config.steps is not None or config.tokens is not None:
        return config.total_steps(0, processes())
    from rosakit.tuning.data import read_documents
    from rosakit.tuning.packing import PackedBlocks

    tokenizer = load_tokenizer(config.model, gguf_file=config.gguf_file)
    texts = read_documents(config.data).train
    blocks = PackedBlocks(texts, tokenizer, config.length, config.data, seed=config.seed)
    return config.total_steps(len(blocks), processes())


def _memory(model: Any, config: TuneConfig, trained: list[Any]) -> dict[str, int]:
    """Bytes of a process that holds the whole model."""
    text = model.config.get_text_config(decoder=True)
    rows, hidden, layers = (
        config.batch_size * config.length,
        text.hidden_size,
        text.num_hidden_layers,
    )
    width = 2 if config.precision in ("auto", "bfloat16", "float16") else 4
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    # Saved for the backward pass of one layer: attention and norms about 10 H, the MLP 3 I.
    layer = rows * (10 * hidden + 3 * inner) * width
    rosa = config.attached()
    if rosa is not None and rosa.adapters:
        routes = rosa.routes or hidden // rosa.bits
        # Positions, lengths and flipped positions are int32; q, k, v and y follow.
        layer += rows * (routes * (2 + rosa.bits) * 4 + 4 * routes * rosa.bits * width)
        if rosa.select:
            # Keys of the candidates, and the value of each where the choice gets credit.
            among = rosa.address_candidates + rosa.far_count
            credit = routes * rosa.bits * width if rosa.select_credit else 0
            layer += rows * among * (2 * rosa.select * 4 + credit)
            layer += rows * among * hidden * 4 if rosa.select_lens else 0
    kept = (
        rows * hidden * width * layers + layer if config.gradient_checkpointing else layer * layers
    )
    if not any(p.requires_grad for p in _below_the_head(model)):
        kept = layer  # no graph is built below the output embedding
    chunk = min(rows, 2048) * text.vocab_size * 4 * 2
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": sum(2 * p.numel() * p.element_size() for p in trained),
        "activations": kept + chunk,
    }


def _below_the_head(model: Any) -> list[Any]:
    route = set()
    if is_attached(model) and model.rosa.token_route is not None:
        route = {id(p) for p in model.rosa.token_route.parameters()}
    return [p for p in model.parameters() if id(p) not in route]


def _operations_a_token(model: Any, config: TuneConfig) -> float:
    """Multiplications and additions of forward and backward pass for one token."""
    text = model.config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters()) - embedding + (head if tied else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rosa = config.attached()
    seen = config.length / 2
    if rosa is not None and rosa.window is not None:
        seen = min(seen, rosa.window + rosa.sink_tokens)
    forward = float(2 * total + 4 * seen * text.hidden_size * text.num_hidden_layers)
    if not any(p.requires_grad for p in _below_the_head(model)):
        return forward
    recomputed = forward if config.gradient_checkpointing else 0.0
    return 2 * forward + recomputed + 2.0 * float(trained)


def _matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, measured for a moment."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    rates = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - begin))
    return max(rates)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"
