"""The cases: what is measured, how it is verified, and the figure it yields.

A case is a function that takes the plan (sizes, repetitions) and yields `Figure`s. It verifies its
result first and raises `AssertionError` if that fails: no verified result, no time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu.streams import FAMILIES, Symbols, batch, tokens
from rosakit import native
from rosakit.layers.token_match import best_successors_naive
from rosakit.native import SuffixMemory
from rosakit.ops.oracle import suffix_match_oracle
from rosakit.types import Match


@dataclass
class Figure:
    """One measured number."""

    case: str
    value: float
    unit: str
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """How much to measure."""

    lengths: tuple[int, ...] = (4096, 16384, 65536, 262144)
    long: int = 1_048_576
    contexts: tuple[int, ...] = (4096, 32768, 131072)
    routes: int = 512
    repeats: int = 9
    families: tuple[str, ...] = FAMILIES


Case = Callable[[Plan], Iterator[Figure]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def best_cpu_time(call: Callable[[], Any], repeats: int) -> float:
    """Least process CPU time of `call`, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def best_wall_time(call: Callable[[], Any], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


_verified: set[tuple[Any, ...]] = set()


def verify(family: str, bits: int, flips: int, **options: Any) -> None:
    """The matcher equals the quadratic oracle on a shorter stream of the family."""
    key = (family, bits, flips, *sorted(options.items()))
    if key in _verified:
        return
    q, k = batch(family, 700, bits, 1)
    got = native.match(q, k, counterfactual_bits=flips, **options)
    want = suffix_match_oracle(
        torch.from_numpy(q), torch.from_numpy(k), counterfactual_bits=flips, **options
    )
    for g, w in zip(got, want, strict=True):
        assert (g is None and w is None) or np.array_equal(g, w.numpy()), f"{key} is wrong"
    _verified.add(key)


def verify_chunked(q: Symbols, k: Symbols, bits: int) -> None:
    """At full length, the streaming memory (another code path) agrees on the first route."""
    q, k = q[:, :1], k[:, :1]
    position, length, _ = native.match(q, k)
    memory = SuffixMemory(1, 1, bits=bits)
    half = q.shape[2] // 2
    for s in (slice(0, half), slice(half, None)):
        found = memory.extend(q[..., s], k[..., s])
        assert np.array_equal(found.position, position[..., s]), "chunked and whole differ"
        assert np.array_equal(found.length, length[..., s]), "chunked and whole differ"


def _routes(n: int) -> int:
    return max(1, min(64, 262144 // n))


@case
def whole(plan: Plan) -> Iterator[Figure]:
    """Full sequence, with and without counterfactual flips, ns of CPU a symbol."""
    settings = [(4, family, n) for family in plan.families for n in plan.lengths]
    settings += [(4, "mk", plan.long)]
    settings += [
        (bits, family, n) for bits in (1, 8) for family in ("iid", "mk") for n in plan.lengths[::2]
    ]
    for bits, family, n in settings:
        q, k = batch(family, n, bits, _routes(n))
        times = []
        for flips in (0, bits):
            verify(family, bits, flips)
            if not flips:
                verify_chunked(q, k, bits)
            seconds = best_cpu_time(
                lambda q=q, k=k, flips=flips: native.match(q, k, counterfactual_bits=flips),
                plan.repeats,
            )
            times.append(seconds / q.size * 1e9)
        where = {"family": family, "bits": bits, "T": n}
        yield Figure("match", times[0], "ns/symbol", where)
        yield Figure("match_counterfactual", times[1], "ns/symbol", where)
        yield Figure("counterfactual_ratio", times[1] / times[0], "x", where)


@case
def runs(plan: Plan) -> Iterator[Figure]:
    """Run granularity, full sequence with counterfactuals."""
    for family in plan.families:
        for n in plan.lengths[:3]:
            verify(family, 4, 4, granularity="run")
            q, k = batch(family, n, 4, _routes(n))
            seconds = best_cpu_time(
                lambda q=q, k=k: native.match(q, k, granularity="run", counterfactual_bits=4),
                plan.repeats,
            )
            yield Figure(
                "run_match_counterfactual",
                seconds / q.size * 1e9,
                "ns/symbol",
                {"family": family, "bits": 4, "T": n},
            )


@case
def streaming(plan: Plan) -> Iterator[Figure]:
    """Online prefill of one memory: the step's worst case over families, and the state's size."""
    for family in plan.families:
        for n in plan.lengths:
            q, k = batch(family, n, 4, _routes(n))
            verify_chunked(q, k, 4)
            memory = SuffixMemory(1, q.shape[1], bits=4)
            seconds = best_cpu_time(lambda memory=memory, q=q, k=k: memory.extend(q, k), 1)
            where = {"family": family, "bits": 4, "T": n}
            yield Figure("prefill", seconds / q.size * 1e9, "ns/symbol", where)
            yield Figure("state", memory.nbytes / q.size, "bytes/symbol", where)
            yield Figure("state_reserved", memory.reserved_nbytes / q.size, "bytes/symbol", where)


def time_steps(
    memory: SuffixMemory, q: Symbols, k: Symbols, at: range, want: Symbols
) -> list[float]:
    """Wall time of each step into the caller's arrays; checked against `want` ``[B, 1, T]``."""
    out = Match(*(np.empty(q.shape[:2], np.int32) for _ in range(2)))  # type: ignore[arg-type]
    times = []
    for i in at:
        qs, ks = (np.ascontiguousarray(x[..., i]) for x in (q, k))
        start = time.perf_counter()
        memory.step(qs, ks, out=out)
        times.append(time.perf_counter() - start)
        assert out.position[0, 0] == want[0, 0, i], "decode and whole differ"
    return times


@case
def decode_families(plan: Plan) -> Iterator[Figure]:
    """One decode step of all routes after the shortest context, stream by stream and by width."""
    n, steps = plan.contexts[0], 64
    settings = [(4, f) for f in plan.families] + [(bits, "mk") for bits in (1, 2, 8)]
    for bits, family in settings:
        q, k = batch(family, n + steps, bits, plan.routes)
        memory = SuffixMemory(1, plan.routes, bits=bits)
        memory.extend(np.ascontiguousarray(q[..., :n]), np.ascontiguousarray(k[..., :n]))
        want = native.match(q[:, :1], k[:, :1])[0]
        times = time_steps(memory, q, k, range(n, n + steps), want)
        where = {"family": family, "bits": bits, "T": n, "routes": plan.routes}
        yield Figure("decode_family", float(np.percentile(times, 10)) * 1e6, "us/step", where)


@case
def decode(plan: Plan) -> Iterator[Figure]:
    """One step of all routes; fork and rollback of the state; all at several contexts."""
    steps = 96
    for n in plan.contexts:
        q, k = batch("mk", n + 2 * steps, 4, plan.routes)
        memory = SuffixMemory(1, plan.routes, bits=4)
        memory.extend(np.ascontiguousarray(q[..., :n]), np.ascontiguousarray(k[..., :n]))
        want = native.match(q[:, :1], k[:, :1])[0]
        times = time_steps(memory, q, k, range(n, n + steps), want)
        where = {"family": "mk", "bits": 4, "T": n, "routes": plan.routes}
        yield Figure("decode", float(np.percentile(times, 10)) * 1e6, "us/step", where)
        yield Figure("decode_median", float(np.median(times)) * 1e6, "us/step", where)
        yield Figure(
            "rollback_8",
            best_wall_time(lambda memory=memory: memory.rollback(8), 1) * 1e6,
            "us",
            where,
        )
        forks: list[SuffixMemory] = []
        yield Figure(
            "fork",
            best_wall_time(lambda m=memory, f=forks: f.append(m.fork()), plan.repeats) * 1e6,
            "us",
            where,
        )
        twin = forks.pop()
        forks.clear()
        at, copied = int(memory.lengths[0]), native.pages_copied()
        first = time_steps(twin, q, k, range(at, at + 1), want)
        copied = native.pages_copied() - copied
        yield Figure("first_step_after_fork", first[0] * 1e6, "us", where)
        yield Figure("pages_copied_after_fork", copied / plan.routes, "pages/stream", where)
        del memory, twin


@case
def candidates(plan: Plan) -> Iterator[Figure]:
    """The 4 best distinct successors of token streams, vocabulary 50,000: whole and streaming."""
    for family in ("hub", "zipf"):
        short = tokens(family, 500, 40, 1)
        naive = best_successors_naive(torch.from_numpy(short).long(), 4, None, 1)
        for got, expected in zip(native.best_successors(short, 4), naive, strict=True):
            assert np.array_equal(got, expected.numpy()), f"candidates of {family} are wrong"
        for n in plan.lengths[:3]:
            ids = tokens(family, n, 50_000, 1)
            where = {"family": family, "T": n, "candidates": 4}
            whole_time = best_cpu_time(lambda ids=ids: native.best_successors(ids, 4), plan.repeats)
            yield Figure("candidates_whole", whole_time / n * 1e9, "ns/token", where)
            memory = SuffixMemory(1, 1, symbols="int32")
            start = time.process_time()
            found = memory.extend(ids[None], ids[None], candidates=4)
            online = time.process_time() - start
            want = native.best_successors(ids, 4)[0]
            assert np.array_equal(found.position[0], want), "streaming and whole differ"
            yield Figure("candidates_online", online / n * 1e9, "ns/token", where)


@case
def files(plan: Plan) -> Iterator[Figure]:
    """Saving and loading."""
    n, routes = plan.lengths[1], 32
    q, k = batch("mk", n, 4, routes)
    memory = SuffixMemory(1, routes, bits=4)
    memory.extend(q, k)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory"
        where = {"family": "mk", "bits": 4, "T": n, "routes": routes}
        yield Figure(
            "save",
            best_wall_time(lambda: memory.save(path), plan.repeats) / q.size * 1e9,
            "ns/symbol",
            where,
        )
        yield Figure(
            "load",
            best_wall_time(lambda: SuffixMemory.load(path), 1) / q.size * 1e9,
            "ns/symbol",
            where,
        )
        yield Figure("file", path.stat().st_size / q.size, "bytes/symbol", where)
        step = np.ascontiguousarray(q[..., :1])
        twin = SuffixMemory.load(path)
        assert np.array_equal(twin.extend(step, step).position, memory.extend(step, step).position)


@case
def threads(plan: Plan) -> Iterator[Figure]:
    """Two threads against one: wall time, and CPU time, which other load blurs less."""
    q, k = batch("mk", 4096, 4, plan.routes)
    verify("mk", 4, 4)
    wall, cpu = [], []
    for n in (1, 2):
        native.set_num_threads(n)
        wall.append(
            best_wall_time(lambda: native.match(q, k, counterfactual_bits=4), plan.repeats + 4)
        )
        cpu.append(
            best_cpu_time(lambda: native.match(q, k, counterfactual_bits=4), plan.repeats + 4)
        )
    native.set_num_threads(1)
    where = {"family": "mk", "T": 4096, "routes": plan.routes}
    yield Figure("two_threads", wall[0] / wall[1], "x", where)
    yield Figure("two_threads_cpu_time", cpu[1] / cpu[0], "x", where)


@case
def peers(plan: Plan) -> Iterator[Figure]:
    """rosa-torch-native, where installed: prefill of self-matching streams and its state."""
    try:
        from rosa._stateful_numba import _init_inference_state
        from rosa_native_step import NativeState
    except ImportError as error:
        print(f"  peers: skipped ({error})")
        return
    for n in plan.lengths[:3]:
        q, k = batch("mk_self", n, 4, 1)
        tokens = np.ascontiguousarray(k[0].astype(np.int64))
        best = float("inf")
        for _ in range(plan.repeats):
            state = _init_inference_state(1, n)
            peer = NativeState(state)
            start = time.process_time()
            found = peer.prefill(tokens)
            best = min(best, time.process_time() - start)
        position, _, _ = native.match(q, k)
        ours = np.where(position[0, 0] >= 0, k[0, 0][position[0, 0]], -1)
        agree = float((np.asarray(found).reshape(-1)[:n] == ours).mean())
        held = sum(v.nbytes for v in vars(state).values() if isinstance(v, np.ndarray))
        where = {"family": "mk_self", "bits": 4, "T": n, "agreement": agree}
        mine = best_cpu_time(lambda q=q, k=k: native.match(q, k), plan.repeats)
        memory = SuffixMemory(1, 1, bits=4)
        online = best_cpu_time(lambda m=memory, q=q, k=k: m.extend(q, k), 1)
        yield Figure("rosa_torch_native_prefill", best / n * 1e9, "ns/symbol", where)
        yield Figure("ours_whole", mine / n * 1e9, "ns/symbol", where)
        yield Figure("ours_online", online / n * 1e9, "ns/symbol", where)
        yield Figure("rosa_torch_native_state", held / n, "bytes/symbol", where)
        yield Figure("ours_state", memory.nbytes / n, "bytes/symbol", where)
