"""What surrounds the kernels: importing without CUDA, plans that fit, and refusals."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rosakit import cuda
from rosakit.cuda import compile, matcher
from rosakit.errors import InvalidInputError, InvalidTypeError

SHARED_LIMIT = 232448  # of compute capability 9.0


def test_import_loads_no_cuda_library():
    code = (
        "import rosakit.cuda, sys; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('cuda', 'triton')]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unavailable_says_why():
    reason = cuda.unavailable_reason()
    assert cuda.available() == (reason is None)
    assert reason is None or len(reason) > 10


@pytest.mark.parametrize("flips", [0, 4, 8])
@pytest.mark.parametrize("length", [1, 63, 2048, 8192, 16384, 32768, 65536, 65537, 131072, 1 << 19])
@pytest.mark.parametrize("limit", [SHARED_LIMIT, 101376], ids=["sm90", "sm86"])
def test_plans_fit(length, flips, limit):
    plan = matcher.plan(length, flips, limit)
    places = dict(plan.places)
    assert plan.shared_bytes <= limit
    assert plan.resident * (plan.shared_bytes + 1024) <= limit + 1024 or plan.resident == 1
    blocks = (length + 63) // 64
    assert ((blocks - 1) >> plan.super_shift) + 1 <= 128
    assert plan.index_bytes == (2 if length <= 65536 else 4)
    # A superblock's counts have 16 bits.
    assert 64 << plan.super_shift <= 65536
    everything = plan.shared_bytes + plan.scratch_bytes
    assert everything >= length * (2 * plan.index_bytes + 1 + 1)
    if length == 16384 and limit == SHARED_LIMIT and flips <= 4:
        assert all(places[name] for name in ("ENTRIES_SHARED", "CHAINS_SHARED", "RANK_SHARED"))
        assert plan.scratch_bytes == 0 or places["RANK_SHARED"] < 2


@pytest.mark.parametrize("length", [1, 16384, 131072, 1 << 19])
def test_run_plans_fit(length):
    plan = matcher.runs_plan(length, SHARED_LIMIT)
    assert plan.shared_bytes <= SHARED_LIMIT
    assert plan.scratch_bytes >= 26 * length


@pytest.mark.parametrize("length", [1, 16384, 1 << 19])
@pytest.mark.parametrize("symbol_bytes", [2, 4])
def test_wide_plans_fit(length, symbol_bytes):
    plan = matcher.wide_plan(length, symbol_bytes)
    assert plan.shared_bytes <= SHARED_LIMIT
    assert plan.scratch_bytes >= length * (8 + 8 + 8 + 2 * symbol_bytes)


def test_refusals():
    symbols = torch.zeros(1, 2, 8, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match="CUDA device"):
        matcher.check(symbols, symbols, None, 0)
    with pytest.raises(InvalidTypeError, match="uint8"):
        matcher.check(symbols.long(), symbols.long(), None, 0)
    with pytest.raises(InvalidTypeError, match="run granularity"):
        matcher.check(symbols.int(), symbols.int(), None, 0, "run")
    with pytest.raises(InvalidInputError, match="one shape"):
        matcher.check(symbols, symbols[..., :4], None, 0)
    with pytest.raises(InvalidInputError, match="granularity"):
        cuda.match(symbols, symbols, granularity="word")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ROSAKIT_CACHE", str(tmp_path))
    assert compile.cache_folder() == tmp_path
    monkeypatch.delenv("ROSAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile.cache_folder() == tmp_path / "rosakit"


def test_threads_launch_with_their_own_arguments(monkeypatch):
    """Two threads in one kernel's launch: each sees its numbers, whoever comes second."""
    together = threading.Barrier(2, timeout=20)
    seen = {}

    class Driver:
        def cuLaunchKernel(self, function, x, *rest):
            places = rest[-2]
            together.wait()  # both have written their arguments
            words = (ctypes.c_uint64 * 3).from_address(places)
            values = [ctypes.c_uint64.from_address(at).value for at in words]
            together.wait()
            seen.setdefault(x, []).append(values)
            return (0,)

    monkeypatch.setattr(compile, "_driver", lambda: Driver())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compile, "stream_of", lambda index: 7)
    kernel = compile.Kernel(object(), "stub", 0)

    def launch(number):
        for turn in range(20):
            kernel.launch_words((number, 1, 1), 64, [number, 2**40 + turn, number * turn])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(launch, number) for number in (1, 2)]:
            done.result()
    for number in (1, 2):
        assert seen[number] == [[number, 2**40 + turn, number * turn] for turn in range(20)]
