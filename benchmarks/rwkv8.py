"""RWKV-8 ROSA layers and models against plain Python, as the published demos compute them.

    python -m benchmarks.rwkv8 --json docs/results/rwkv8_speed.json

Every case is checked first (same outputs, bit for bit); a case whose check fails reports no time.
Both sides run on one thread in one process, in turn, and are measured in CPU time: the ratio is
what to read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rosakit import native, symbols
from rosakit.evaluate.environment import describe_environment
from rosakit.models import rwkv8
from rosakit.types import Match


def python_positions(q: list[int], k: list[int]) -> list[int]:
    """Successor positions of one stream by an online suffix automaton in plain Python."""
    edges: list[dict[int, int]] = [{}]
    link, size, latest = [-1], [0], [-1]
    cursor = length = last = 0
    found = []
    for i, (asked, key) in enumerate(zip(q, k, strict=True)):
        while cursor and asked not in edges[cursor]:
            cursor = link[cursor]
            length = size[cursor]
        if asked in edges[cursor]:
            cursor, length = edges[cursor][asked], length + 1
        found.append(latest[cursor] + 1 if length else -1)

        new = len(edges)
        edges.append({})
        link.append(0)
        size.append(size[last] + 1)
        latest.append(i)
        walk = last
        while walk != -1 and key not in edges[walk]:
            edges[walk][key] = new
            walk = link[walk]
        if walk != -1:
            target = edges[walk][key]
            if size[walk] + 1 == size[target]:
                link[new] = target
            else:
                clone = len(edges)
                edges.append(dict(edges[target]))
                link.append(link[target])
                size.append(size[walk] + 1)
                latest.append(latest[target])
                while walk != -1 and edges[walk].get(key) == target:
                    edges[walk][key] = clone
                    walk = link[walk]
                link[target] = link[new] = clone
        last, walk = new, link[new]
        while walk > 0:
            latest[walk] = i
            walk = link[walk]
        while cursor and size[link[cursor]] >= length:  # a clone took over the cursor's string
            cursor = link[cursor]
    return found


def python_match(q: Tensor, k: Tensor, **_: Any) -> Match:
    """`suffix_match` with `python_positions` inside; lengths are left out."""
    rows = [
        python_positions(a.tolist(), b.tolist())
        for a, b in zip(q.flatten(0, -2), k.flatten(0, -2), strict=True)
    ]
    position = torch.tensor(rows, dtype=torch.int32).view(q.shape)
    return Match(position, torch.zeros_like(position))


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Inside, whole-sequence forward passes match in plain Python."""

    def fake_native(q: Any, k: Any, **_: Any) -> tuple[Any, Any, None]:
        found = python_match(torch.from_numpy(q), torch.from_numpy(k))
        return found.position.numpy(), found.length.numpy(), None

    with mock.patch.object(native, "match", fake_native):
        yield


@dataclass(frozen=True)
class Case:
    """A thing to time: the same result by rosakit and by plain Python.

    Attributes:
        name: for the table.
        tokens: what a second is counted in.
        ours, reference: functions of no argument that return a tensor.
    """

    name: str
    tokens: int
    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]


def random_tokens(vocabulary: int, batch: int, length: int) -> Tensor:
    """Random phrases that come back, so that there are long matches."""
    generator = torch.Generator().manual_seed(0)
    phrase = torch.randint(vocabulary, (batch, length // 3 + 1), generator=generator)
    noise = torch.rand(batch, length, generator=generator) < 0.05
    other = torch.randint(vocabulary, (batch, length), generator=generator)
    return torch.where(noise, other, phrase.repeat(1, 4)[:, :length])


def whole(model: rwkv8.RosaModel, tokens: Tensor) -> tuple[Callable[[], Tensor], ...]:
    def ours() -> Tensor:
        return model(tokens)

    def reference() -> Tensor:
        with in_python():
            return model(tokens)

    return ours, reference


def decode(model: rwkv8.RosaModel, prompt: Tensor, new: int) -> tuple[Callable[[], Tensor], ...]:
    """Greedy decoding: with a state, and as the published scripts do, from scratch every token."""

    def ours() -> Tensor:
        state, made = model.init_state(len(prompt)), []
        logits = model.step(prompt, state)[:, -1]
        for _ in range(new):
            made.append(logits.argmax(-1))
            logits = model.step(made[-1], state)
        return torch.stack(made, 1)

    def reference() -> Tensor:
        tokens = prompt
        with in_python():
            for _ in range(new):
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
        return tokens[:, prompt.shape[1] :]

    return ours, reference


def layer(channels: int, bits: int, length: int) -> tuple[Callable[[], Tensor], ...]:
    torch.manual_seed(0)
    module = rwkv8.RosaQkvLayer(channels, bits)
    q, k, v = torch.randn(3, 1, length, channels)

    def reference() -> Tensor:
        with in_python():
            return module(q, k, v)

    return (lambda: module(q, k, v)), reference


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    counting = rwkv8.CountingModel(rwkv8.CountingConfig(layers=4, bits=4)).eval()
    tokens = random_tokens(11, 16, 127)
    yield Case(
        "counting model, 4 layers of 4 bits, 16 x 127", tokens.numel(), *whole(counting, tokens)
    )
    reverse = rwkv8.HybridModel(rwkv8.HybridConfig()).eval()
    tokens = random_tokens(12, 10, 128)
    yield Case("reversal model (RWKV-7 + ROSA), 10 x 128", tokens.numel(), *whole(reverse, tokens))
    for bits in (1, 4):
        name = f"QKV layer, 768 channels, {bits} bit{'s' * (bits > 1)}, T = 1024"
        yield Case(name, 1024, *layer(768, bits, 1024))
    config = rwkv8.RosaLMConfig(vocabulary=2048, channels=256, layers=4, bits=4, hidden=1024)
    small = rwkv8.RosaLM(config).eval()
    prompt = random_tokens(2048, 1, 96)
    yield Case("decode, LM of 4 x 256 channels, 96 + 16 tokens", 16, *decode(small, prompt, 16))


def timed(run: Callable[[], Tensor], least: float = 1.0) -> float:
    """Median CPU seconds of a run (one thread), repeated that long and at least three times."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    """One row of the table: tokens a CPU second of both, or why there is none."""
    if not torch.equal(case.ours(), case.reference()):
        return {"case": case.name, "check": "outputs differ"}
    ours, reference = timed(case.ours), timed(case.reference, 0.0)
    return {
        "case": case.name,
        "check": "equal",
        "rosakit_tokens_per_second": round(case.tokens / ours, 1),
        "python_tokens_per_second": round(case.tokens / reference, 1),
        "ratio": round(reference / ours, 1),
    }


def self_check() -> None:
    """The plain Python reference itself, against the oracle."""
    from rosakit.ops.oracle import suffix_match_oracle

    generator = torch.Generator().manual_seed(1)
    for bits in (1, 2, 4):
        q, k = torch.randint(2**bits, (2, 1, 20, 90), generator=generator)
        k = torch.where(torch.rand(k.shape, generator=generator) < 0.7, q, k)
        q, k = (x.to(symbols.symbol_dtype(bits)) for x in (q, k))
        if not torch.equal(python_match(q, k).position, suffix_match_oracle(q, k).position):
            raise SystemExit("the plain Python reference is wrong; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not native.available():
        raise SystemExit("the compiled core is missing, there is nothing to compare")
    native.set_num_threads(1)
    self_check()
    rows = []
    for case in cases():
        row = measure(case)
        rows.append(row)
        if row["check"] == "equal":
            speed = row["rosakit_tokens_per_second"], row["python_tokens_per_second"]
            print(
                f"{case.name:48s} {speed[0]:>10,.0f} {speed[1]:>9,.0f} tok/s {row['ratio']:7.1f}x"
            )
        else:
            print(f"{case.name:48s} {row['check']}")
    if options.json is not None:
        environment = dataclasses.asdict(describe_environment())
        content = {"environment": environment, "threads": 1, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if any(row["check"] != "equal" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
