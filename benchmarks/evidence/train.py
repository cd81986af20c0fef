"""Training one arm, and scoring with it."""

from __future__ import annotations

import math
import queue
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.arms import Arm
from benchmarks.evidence.fast_lora import add_summed_lora, remove_summed_lora
from benchmarks.evidence.view import CHUNK, Seen, View, scattered, viewing
from rosakit.evaluate.scores import LabelScores, Scorer
from rosakit.layers import TokenCandidates, TokenRoute
from rosakit.layers.token_match import best_successors, gather_candidates
from rosakit.tuning import RosaConfig, attach, detach, is_attached, rosa_parameters
from rosakit.tuning.loss import Head, candidate_nll, log_probs_of

__all__ = ["Learner", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """How much is trained.

    Attributes:
        tokens: tokens seen.
        block: tokens of a sequence.
        batch: sequences a forward pass.
        accumulate: forward passes a step.
        lr_lora, lr_route, lr_adapters: peak learning rates; queries and keys get a tenth.
        window: of the arm.
    """

    tokens: int = 4_000_000
    block: int = 4096
    batch: int = 2
    accumulate: int = 2
    lr_lora: float = 1e-3
    lr_route: float = 2e-2
    lr_adapters: float = 1e-3
    window: int = 256


@dataclass
class Learner:
    """A model with what an arm adds to it.

    Args:
        model: a plain causal language model; LoRA is put into it.
        arm: what is added.
        window: tokens.
        seed: of the added parameters and of the data order.
    """

    model: Any
    arm: Arm
    window: int
    seed: int
    route: TokenRoute | None = None
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self._add()
        except BaseException:
            self.remove()  # the next arm starts from the plain model
            raise

    def _add(self) -> None:
        """Put into the model what the arm trains."""
        torch.manual_seed(self.seed)
        self.model.requires_grad_(False)
        first = next(self.model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.lora = add_summed_lora(self.model, self.arm.rank) if self.arm.rank else []
        if self.arm.route:
            hidden = self.model.config.hidden_size
            self.route = TokenRoute(hidden, candidates=self.arm.route, device=self.device)
        self.adapters: dict[str, nn.Parameter] = {}
        if self.arm.adapters:
            depth = self.model.config.num_hidden_layers
            config = RosaConfig(
                window=None,
                layers=tuple(layer for layer in self.arm.adapters if layer < depth),
                own_value=True,
                retrieve=self.arm.retrieve,
                **dict(self.arm.options),
            )
            attach(self.model, config)
            self.adapters = rosa_parameters(self.model)
        weight = self.model.get_output_embeddings().weight.detach()
        self.head = Head(weight, None)

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self._trained())

    def computing(self) -> AbstractContextManager[None]:
        """The arm's attention."""
        return viewing(self.model, self.arm.view)

    def candidates(self, ids: Tensor) -> TokenCandidates | None:
        """The token route's candidates under the arm's rule."""
        if self.route is None:
            return None
        match = best_successors(ids, self.arm.route)
        if self.arm.candidates == "random":
            match = scattered(match)
        found = gather_candidates(ids, match)
        if self.arm.candidates == "near":
            far = found.distance >= self.window
            found = TokenCandidates(*(x.masked_fill(far, 0) for x in found))
        if self.arm.candidates == "own":
            found = self.route.own_value_candidates(ids, found)
        return found

    def nll(self, ids: Tensor) -> Tensor:
        """Loss of every token but the first, ``[B, T - 1]``; call inside `computing`."""
        hidden = self.model.get_decoder()(input_ids=ids)[0]
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        target = ids[:, 1:].reshape(-1)
        found = self.candidates(ids)
        if found is None:
            loss = -log_probs_of(flat, target[:, None], self.head)[:, 0]
        else:
            assert self.route is not None
            kept = TokenCandidates(*(x[:, :-1].reshape(-1, self.arm.route) for x in found))
            asked = torch.cat([target[:, None], kept.token], dim=1)
            log_p = log_probs_of(flat, asked, self.head)
            loss = candidate_nll(self.route, flat, log_p, target, kept)[0]
        return loss.view(ids.shape[0], -1)

    def train(self, blocks: dict[str, Any], sizes: Sizes, deadline: float) -> dict[str, Any]:
        """Train on blocks ``[n, block]`` of each kind in turn until tokens or time run out.

        Args:
            blocks: token ids by kind.
            sizes: how much.
            deadline: on `time.monotonic`; a run that meets it says so in its result.
        """
        groups: list[dict[str, Any]] = []
        if self.lora:
            groups.append({"params": self.lora, "lr": sizes.lr_lora})
        if self.route is not None:
            groups.append({"params": list(self.route.parameters()), "lr": sizes.lr_route})
        for learns_address in (False, True):
            chosen = [p for n, p in self.adapters.items() if _is_address(n) == learns_address]
            if chosen:
                rate = sizes.lr_adapters * (0.1 if learns_address else 1)
                groups.append({"params": chosen, "lr": rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
        peaks = [group["lr"] for group in optimizer.param_groups]
        a_step = sizes.block * sizes.batch * sizes.accumulate
        steps = max(1, sizes.tokens // a_step)
        fed: queue.Queue[Tensor] = queue.Queue(4)
        stop = threading.Event()
        feeder = threading.Thread(
            target=self._feed, args=(blocks, sizes, steps, fed, stop), daemon=True
        )
        feeder.start()
        began, done = time.monotonic(), 0
        hidden = np.random.default_rng([self.seed, 11])
        without = replace(self.arm.view, recall=0)
        try:
            with ExitStack() as context:
                shown: View | None = None
                for step in range(steps):
                    view = without if hidden.random() < self.arm.hide else self.arm.view
                    if view != shown:
                        context.close()
                        context.enter_context(viewing(self.model, view))
                        shown = view
                    warm = min(1.0, (step + 1) / max(1, steps // 20))
                    scale = warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                        group["lr"] = peak * scale
                    total = torch.zeros((), device=self.device)
                    for _ in range(sizes.accumulate):
                        ids = fed.get(timeout=120).to(self.device)
                        total += self._accumulate(ids, sizes.accumulate)
                        done += ids.numel()
                    nn.utils.clip_grad_norm_(self._trained(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if step % 10 == 0 or step == steps - 1:
                        self.history.append(float(total))
                    if time.monotonic() > deadline:
                        break
        finally:
            stop.set()
        seconds = time.monotonic() - began
        return {
            "tokens": done,
            "tokens_planned": steps * a_step,
            "seconds": round(seconds, 1),
            "losses": self.history,
        }

    def _accumulate(self, ids: Tensor, parts: int) -> Tensor:
        """Loss of a batch, its gradients added; waits where others hold the GPU's memory."""
        for attempt in range(60):
            before = [None if p.grad is None else p.grad.clone() for p in self._trained()]
            try:
                loss = self.nll(ids).mean() / parts
                loss.backward()
                return loss.detach()
            except torch.OutOfMemoryError:
                if attempt == 59:
                    raise
            for parameter, gradient in zip(self._trained(), before, strict=True):
                parameter.grad = gradient
            torch.cuda.empty_cache()
            time.sleep(2)
        raise AssertionError("unreachable")

    def _trained(self) -> list[nn.Parameter]:
        own = [] if self.route is None else list(self.route.parameters())
        return [*self.lora, *own, *self.adapters.values()]

    def remove(self) -> None:
        """Take off the model what was added to it."""
        if is_attached(self.model):
            detach(self.model)
        remove_summed_lora(self.model)

    def extra_keys(self, ids: Tensor) -> float:
        """Keys that a query sees beside its window and sinks, on average."""
        if not self.arm.view.recall:
            return 0.0
        seen = Seen(self.arm.view, ids, torch.float32)
        count = 0
        for start in range(0, ids.shape[1], CHUNK):
            near, both = (seen.bias(start, recall) for recall in (False, True))
            count += int((both == 0).sum()) - len(ids) * int((near == 0).sum())
        return count / ids.numel()

    def _feed(
        self,
        blocks: dict[str, Any],
        sizes: Sizes,
        steps: int,
        fed: queue.Queue[Tensor],
        stop: threading.Event,
    ) -> None:
        """Batches in an order that follows from the seed alone."""
        generator = np.random.default_rng([self.seed, 7])
        kinds = list(blocks)
        orders = {kind: generator.permutation(len(rows)) for kind, rows in blocks.items()}
        count = 0
        for _ in range(steps * sizes.accumulate):
            rows = []
            for _ in range(sizes.batch):
                kind = kinds[count % len(kinds)]
                order = orders[kind]
                row = blocks[kind][order[count // len(kinds) % len(order)]][: sizes.block]
                row = row.astype(np.int64)
                if self.arm.repeat and generator.random() < 0.5:
                    _repeat(row, self.arm.repeat, self.window, generator)
                rows.append(row)
                count += 1
            while not stop.is_set():
                try:
                    fed.put(torch.from_numpy(np.stack(rows)), timeout=1)
                    break
                except queue.Full:
                    continue

    def scorer(self) -> Scorer:
        """How evaluations ask for log probabilities; whole sequences, no padding on the left."""

        def score(
            input_ids: Tensor, mask: Tensor | None = None, keep: int | None = None
        ) -> dict[str, LabelScores]:
            keep = input_ids.shape[1] - 1 if keep is None else keep
            with torch.inference_mode(), self.computing():
                hidden = self.model.get_decoder()(input_ids=input_ids)[0][:, -keep - 1 : -1]
                found = self.candidates(input_ids)
                logs, hits = [], []
                for start in range(0, keep, 1024):
                    part = slice(start, start + 1024)
                    logits = nn.functional.linear(hidden[:, part], *self.head).float()
                    if found is not None:
                        assert self.route is not None
                        near = TokenCandidates(*(x[:, -keep - 1 : -1][:, part] for x in found))
                        logits = self.route(hidden[:, part], logits, near)
                    label = input_ids[:, -keep:][:, part, None]
                    logs.append((logits.gather(-1, label) - logits.logsumexp(-1, True))[..., 0])
                    hits.append(logits.argmax(-1, keepdim=True).eq(label)[..., 0])
            return {"model": LabelScores(torch.cat(logs, 1).cpu(), torch.cat(hits, 1).cpu())}

        return score


def _is_address(name: str) -> bool:
    return any(part in name for part in ("w_q", "w_k", "w_qk", "q_proj", "k_proj"))


def _repeat(row: Any, times: int, window: int, generator: np.random.Generator) -> None:
    """Copy passages of a sequence to places more than a window later."""
    length = len(row)
    for _ in range(times):
        size = int(generator.integers(16, 97))
        first, last = window + size, length - size
        if first >= last:
            return
        place = int(generator.integers(first, last))
        source = int(generator.integers(0, place - window - size + 1))
        row[place : place + size] = row[source : source + size]
