"""Free-threaded CPython: the core is imported without re-enabling the GIL, and threads agree.

The core is loaded on its own, so that this also runs where there is no torch for the interpreter
(`--noconftest`, since the shared fixtures need it).
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="needs a free-threaded interpreter (python3.13t or newer), which this is not",
)

RULE = (False, False, 2**31 - 1, 1)  # token granularity, any length
THREADS = 8


@pytest.fixture(scope="module")
def core() -> Any:
    """The extension module; from its file where importing rosakit would need a missing torch."""
    if importlib.util.find_spec("torch"):
        from rosakit.native._load import core

        module = core()
    else:
        package = PathFinder.find_spec("rosakit")
        assert package is not None, "rosakit is neither installed nor on PYTHONPATH"
        folders = [f"{at}/native" for at in package.submodule_search_locations or ()]
        spec = PathFinder.find_spec("_core", folders)
        assert spec is not None, f"no compiled core for this interpreter in {folders}"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
    return module


def symbols(routes: int, time: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, (1, routes, time), dtype=np.uint8)


def naive(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Successor and length of the longest earlier suffix, the latest of them, by comparison."""
    position, length = np.full(q.shape, -1, np.int32), np.zeros(q.shape, np.int32)
    for at in np.ndindex(q.shape[:2]):
        x = q[at].tobytes()
        for i in range(len(x)):
            for j in range(i):
                n = 0
                while n <= j and x[j - n] == x[i - n]:
                    n += 1
                if n and n >= length[(*at, i)]:
                    position[(*at, i)], length[(*at, i)] = j + 1, n
    return position, length


def match(core: Any, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position, length = np.empty(q.shape, np.int32), np.empty(q.shape, np.int32)
    core.match(q, q, None, position, length, None, *RULE)
    return position, length


def feed(memory: Any, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position, length = np.empty(q.shape, np.int32), np.empty(q.shape, np.int32)
    for i in range(q.shape[2]):
        s = np.ascontiguousarray(q[..., i])
        p, n = np.empty(q.shape[:2], np.int32), np.empty(q.shape[:2], np.int32)
        memory.step(s, s, None, p, n)
        position[..., i], length[..., i] = p, n
    return position, length


def at_once(work: Callable[[], Any]) -> list[Any]:
    """What `THREADS` threads get that start `work` together."""
    ready = threading.Barrier(THREADS)

    def run(_: int) -> Any:
        ready.wait()
        return work()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_the_matcher_is_right_from_every_thread(core: Any) -> None:
    q = symbols(8, 120)
    want = naive(q)
    for got in at_once(lambda: [match(core, q) for _ in range(50)]):
        for position, length in got:
            assert np.array_equal(position, want[0])
            assert np.array_equal(length, want[1])
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]


def test_every_thread_decodes_a_memory_of_its_own(core: Any) -> None:
    q = symbols(8, 500)
    want = match(core, q)
    for position, length in at_once(lambda: feed(core.SuffixMemory(1, 8, 2, *RULE, 0), q)):
        assert np.array_equal(position, want[0])
        assert np.array_equal(length, want[1])


def test_threads_fork_one_memory_and_go_on_and_back(core: Any) -> None:
    q = symbols(8, 500)
    want = [half[..., 300:] for half in match(core, q)]
    stem = core.SuffixMemory(1, 8, 2, *RULE, 0)
    feed(stem, q[..., :300])

    def branch() -> list[tuple[np.ndarray, np.ndarray]]:
        fork = stem.index_select([0])
        first = feed(fork, q[..., 300:])
        fork.truncate(0, 300)
        return [first, feed(fork, q[..., 300:])]

    for got in at_once(branch):
        for position, length in got:
            assert np.array_equal(position, want[0])
            assert np.array_equal(length, want[1])
    assert stem.lengths() == [300]
