"""Free-threaded CPython: the core is imported without re-enabling the GIL, and threads agree."""

from __future__ import annotations

import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rosakit import native
from rosakit.native import SuffixMemory

pytestmark = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"),
    reason="needs a free-threaded interpreter (python3.13t or newer), which this is not",
)


def test_the_gil_stays_off_and_threads_agree() -> None:
    native.num_threads()  # loads the core
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    q = rng.integers(0, 4, (1, 8, 500), dtype=np.uint8)
    want = native.match(q, q)[0]

    def decode(_: int) -> np.ndarray:
        memory = SuffixMemory(1, 8, bits=2)
        steps = [np.ascontiguousarray(q[..., i : i + 1]) for i in range(q.shape[2])]
        return np.concatenate([memory.extend(s, s).position for s in steps], axis=2)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(decode, range(16)):
            assert np.array_equal(got, want)
