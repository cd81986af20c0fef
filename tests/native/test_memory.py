"""SuffixMemory: chunked = whole, and every operation on the state."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosakit import native
from rosakit.errors import CheckpointError, InvalidInputError, InvalidTypeError
from rosakit.native import SuffixMemory
from rosakit.types import Match

from .streams import FAMILIES, draw

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled core is not built")


def pair(n, routes=2, bits=4, family="noisy", seed=0, batch=1):
    streams = [draw(family, n, 2**bits, seed + s) for s in range(batch * routes)]
    return tuple(
        np.stack([s[side] for s in streams]).reshape(batch, routes, n).astype(np.uint8)
        for side in (0, 1)
    )


def fed(q, k, **options):
    memory = SuffixMemory(q.shape[0], q.shape[1], **{"bits": 4, **options})
    memory.extend(q, k)
    return memory


def assert_continues_like(memory, q, k, **options):
    """The memory gives what a whole-sequence call gives past its length."""
    done = int(memory.lengths[0])
    position, length, _ = native.match(q, k, **options)
    found = memory.extend(q[:, :, done:], k[:, :, done:])
    np.testing.assert_array_equal(found.position, position[:, :, done:])
    np.testing.assert_array_equal(found.length, length[:, :, done:])


@given(
    st.sampled_from(FAMILIES), st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 8, 16, None]),
    st.sampled_from(["token", "run"]), st.sampled_from(["available", "strict"]),
    st.sampled_from([None, 1, 3]), st.sampled_from([1, 2]),
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_any_chunking_equals_whole(family, seed, bits, granularity, successor, cap, least, cuts):
    n = 150
    alphabet = 2 ** min(bits or 5, 5)
    dtype = np.uint8 if bits and bits <= 8 else np.uint16 if bits else np.int32
    q, k = (x[None, None].astype(dtype) for x in draw(family, n, alphabet, seed))
    options = {
        "granularity": granularity, "successor": successor, "max_length": cap, "min_length": least
    }  # fmt: skip
    position, length, _ = native.match(q, k, **options)
    memory = SuffixMemory(1, 1, bits=bits, **options)
    begin = 0
    for cut in [*cuts, n]:
        end = min(n, begin + cut)
        found = memory.extend(q[..., begin:end], k[..., begin:end])
        np.testing.assert_array_equal(found.position, position[..., begin:end])
        np.testing.assert_array_equal(found.length, length[..., begin:end])
        begin = end
    assert memory.lengths.tolist() == [n]


def test_masked_positions_leave_no_trace():
    q, k = pair(120, batch=3)
    rng = np.random.default_rng(1)
    mask = rng.random((3, 120)) < 0.6
    memory = SuffixMemory(3, 2, bits=4)
    parts = [
        memory.extend(q[..., s], k[..., s], mask=mask[:, s]) for s in (slice(0, 50), slice(50, 120))
    ]
    position = np.concatenate([p.position for p in parts], -1)
    for b in range(3):
        want, _, _ = native.match(q[b : b + 1][..., mask[b]], k[b : b + 1][..., mask[b]])
        np.testing.assert_array_equal(position[b][:, mask[b]], want[0])
        assert (position[b][:, ~mask[b]] == -1).all()
    np.testing.assert_array_equal(memory.lengths, mask.sum(1))


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_candidates_equal_whole_sequence(chunk):
    tokens = draw("copied", 60, 9, 5)[0].astype(np.int32)[None]
    position, length = native.best_successors(tokens, 3)
    memory = SuffixMemory(1, 1, symbols="int32")
    for begin in range(0, 60, chunk):
        part = tokens[:, None, begin : begin + chunk]
        found = memory.extend(part, part, candidates=3)
        np.testing.assert_array_equal(found.position[0, 0], position[0, begin : begin + chunk])
        np.testing.assert_array_equal(found.length[0, 0], length[0, begin : begin + chunk])


@pytest.mark.parametrize("granularity", ["token", "run"])
@pytest.mark.parametrize("family", ["noisy", "constant", "period3", "blocks", "lagged"])
def test_truncate_and_rollback(family, granularity):
    q, k = pair(200, family=family)
    memory = fed(q[..., :120], k[..., :120], granularity=granularity)
    memory.rollback(3)
    assert memory.lengths.tolist() == [117]
    memory.truncate(90)
    other_q, other_k = pair(200, family="random", seed=9)
    q[..., 90:], k[..., 90:] = other_q[..., 90:], other_k[..., 90:]
    assert_continues_like(memory, q, k, granularity=granularity)
    memory.truncate(0)
    assert_continues_like(memory, q, k, granularity=granularity)


def test_forks_are_independent():
    q, k = pair(100)
    memory = fed(q[..., :50], k[..., :50])
    twin = memory.fork()
    memory.extend(k[..., 50:], q[..., 50:])
    assert_continues_like(twin, q, k)
    assert copy.deepcopy(twin).lengths.tolist() == [100]


def test_index_select_reorders_rows():
    q, k = pair(100, batch=3)
    memory = fed(q[..., :50], k[..., :50]).index_select(torch.tensor([2, 2, 0, 1]))
    order = [2, 2, 0, 1]
    assert_continues_like(memory, q[order], k[order])


def test_ragged_rows_and_reset():
    q, k = pair(80, batch=2)
    memory = fed(q[..., :40], k[..., :40])
    memory.truncate([40, 10])
    assert memory.lengths.tolist() == [40, 10]
    memory.reset([0])
    assert memory.lengths.tolist() == [0, 10]
    memory.rollback([0, 10])
    assert_continues_like(memory, q, k)


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "run", "successor": "strict"}, {"max_length": 3}]
)
def test_save_load_and_pickle(tmp_path, options):
    q, k = pair(100)
    memory = fed(q[..., :60], k[..., :60], **options)
    memory.save(tmp_path / "memory.bin")
    for twin in (SuffixMemory.load(tmp_path / "memory.bin"), pickle.loads(pickle.dumps(memory))):
        assert twin.lengths.tolist() == [60]
        assert_continues_like(twin, q, k, **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "memory.bin"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "memory.bin"
    fed(*pair(50)).save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [
        b"",
        good[:40],
        good[:-1],
        good + b"\0",
        b"PK" + good[2:],
        good[:8] + b"\x63" + good[9:],
    ]
    for at in rng.integers(0, len(good), 40):
        damaged.append(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="memory file"):
            SuffixMemory.load(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        SuffixMemory.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot save"):
        fed(*pair(50)).save(tmp_path / "no" / "folder")


def test_newer_files_name_their_version(tmp_path):
    path = tmp_path / "memory.bin"
    fed(*pair(50)).save(path)
    data = bytearray(path.read_bytes())
    data[8] = 77
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="version 77 is newer"):
        SuffixMemory.load(path)


def test_tensors_in_tensors_out():
    q, k = pair(30)
    memory = SuffixMemory(1, 2, bits=4)
    found = memory.extend(torch.from_numpy(q), torch.from_numpy(k))
    assert found.position.dtype == torch.int32
    np.testing.assert_array_equal(found.position.numpy(), native.match(q, k)[0])


def test_wrong_input_is_refused_and_changes_nothing():
    q, k = pair(30)
    memory = fed(q, k)
    with pytest.raises(
        InvalidInputError, match=r"symbol \d+, but symbols of this memory lie in \[0, 16\)"
    ):
        memory.extend(q | 16, k)
    with pytest.raises(InvalidInputError, match="memory takes"):
        memory.extend(q[:, :1], k[:, :1])
    with pytest.raises(InvalidTypeError, match="int64"):
        memory.extend(q.astype(np.int64), k.astype(np.int64))
    with pytest.raises(InvalidInputError, match="mask"):
        memory.extend(q, k, mask=np.ones((1, 3), bool))
    with pytest.raises(InvalidInputError, match="roll back"):
        memory.rollback(31)
    with pytest.raises(InvalidInputError, match="row 5"):
        memory.index_select([5])
    with pytest.raises(InvalidInputError, match="candidates"):
        memory.extend(q, q, candidates=2)
    with pytest.raises(InvalidInputError, match="bits"):
        SuffixMemory(1, 1, bits=17)
    assert memory.lengths.tolist() == [30]


def test_padding_may_hold_any_symbol():
    memory = SuffixMemory(1, 1, bits=4)
    x = np.array([[[255, 1, 1]]], np.uint8)
    found = memory.extend(x, x, mask=np.array([[False, True, True]]))
    assert found.position.tolist() == [[[-1, -1, 1]]]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_steps_into_the_callers_arrays_equal_the_whole(kind, bits):
    dtype = np.uint8 if bits <= 8 else np.uint16
    q, k = (x.astype(dtype) for x in pair(90, routes=3, batch=2, bits=bits))
    position, length, _ = native.match(q, k)
    memory = SuffixMemory(2, 3, bits=bits)
    wrap = torch.from_numpy if kind == "torch" else lambda x: x
    out = Match(*(wrap(np.full((2, 3), 77, np.int32)) for _ in range(2)))
    for i in range(90):
        step = [wrap(np.ascontiguousarray(x[..., i])) for x in (q, k)]
        assert memory.step(*step, out=out) is out
        np.testing.assert_array_equal(np.asarray(out.position), position[..., i])
        np.testing.assert_array_equal(np.asarray(out.length), length[..., i])
    fresh = memory.step(*step)
    assert type(fresh.position) is type(step[0])
    memory.rollback(1)
    again = memory.step(*step, out=(out.position, out.length))
    np.testing.assert_array_equal(np.asarray(fresh.position), np.asarray(again.position))


def test_a_masked_row_takes_no_step():
    q, k = pair(20, batch=2)
    memory = fed(q[..., :19], k[..., :19])
    found = memory.step(q[..., 19].copy(), k[..., 19].copy(), mask=np.array([True, False]))
    assert memory.lengths.tolist() == [20, 19]
    assert (found.position[1] == -1).all()
    np.testing.assert_array_equal(found.position[0], native.match(q, k)[0][0, :, 19])


def test_a_step_allocates_nothing():
    q, k = (np.ascontiguousarray(x[..., 0]) for x in pair(1, routes=64))
    memory = SuffixMemory(1, 64, bits=4)
    out = Match(np.empty((1, 64), np.int32), np.empty((1, 64), np.int32))
    memory.step(q, k, out=out)
    tracemalloc.start()
    for _ in range(50):
        memory.step(q, k, out=out)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 1000


def test_wrong_steps_say_what_is_wrong():
    memory = SuffixMemory(1, 2, bits=4)
    x = np.zeros((1, 2), np.uint8)
    out = Match(np.empty((1, 2), np.int32), np.empty((1, 2), np.int32))
    with pytest.raises(InvalidTypeError, match="int64"):
        memory.step(x, x, out=(out.position.astype(np.int64), out.length))
    with pytest.raises(InvalidTypeError, match="C-contiguous"):
        memory.step(x[..., None], x[..., None], out=out)
    with pytest.raises(InvalidTypeError, match="list"):
        memory.step([[1, 2]], x, out=out)
    with pytest.raises(InvalidInputError, match=r"shape \[B, R\]"):
        memory.step(np.zeros((1, 3), np.uint8), np.zeros((1, 3), np.uint8), out=out)
    with pytest.raises(InvalidInputError, match=r"\[0, 16\)"):
        memory.step(x + 99, x, out=out)
    assert memory.lengths.tolist() == [0]


@pytest.mark.parametrize("symbols", [(0, 0), (5, 5), (3, 9)])
@pytest.mark.parametrize("switch", [3, 33, 400])
def test_constant_streams_take_no_state_until_they_change(symbols, switch):
    q, k = pair(switch + 60, family="noisy")
    q[..., :switch], k[..., :switch] = symbols
    memory = fed(q[..., :switch], k[..., :switch])
    assert memory.nbytes < 2 * 6000
    twin = memory.fork()
    position, length, _ = native.match(q[..., :switch], k[..., :switch])
    again = SuffixMemory(1, 2, bits=4).extend(q[..., :switch], k[..., :switch])
    np.testing.assert_array_equal(again.position, position)
    np.testing.assert_array_equal(again.length, length)
    assert_continues_like(memory, q, k)
    memory.truncate(switch // 2)
    assert_continues_like(memory, q, k)
    twin = pickle.loads(pickle.dumps(twin))
    assert_continues_like(twin, q, k)


@pytest.mark.parametrize("family", ["constant", "period3", "blocks", "copied", "noisy"])
def test_speculation_taken_back_leaves_no_trace(family):
    q, k = pair(300, family=family)
    other_q, other_k = pair(300, family="random", seed=4)
    memory = SuffixMemory(1, 2, bits=4)
    position, length, _ = native.match(q, k)
    rng = np.random.default_rng(0)
    done = 0
    while done < 300:
        n = int(rng.integers(1, 24))
        memory.extend(other_q[..., :n], other_k[..., :n])
        memory.rollback(n)
        n = min(int(rng.integers(1, 24)), 300 - done)
        found = memory.extend(q[..., done : done + n], k[..., done : done + n])
        np.testing.assert_array_equal(found.position, position[..., done : done + n])
        np.testing.assert_array_equal(found.length, length[..., done : done + n])
        done += n


def test_context_manager_releases_what_it_held():
    with fed(*pair(100)) as memory:
        assert memory.lengths.tolist() == [100]
    assert memory.lengths.tolist() == [0]


def test_a_byte_budget_bounds_the_state():
    memory = SuffixMemory(1, 2, bits=4, max_bytes=1_000_000)
    q, k = pair(20_000)
    memory.extend(q, k)
    assert memory.reserved_nbytes <= 1_000_000
    start = int(memory.starts[0])
    assert 0 < start < 20_000
    tail_q, tail_k = pair(300, seed=5)
    whole = [np.concatenate([x[..., start:], t], -1) for x, t in ((q, tail_q), (k, tail_k))]
    position, length, _ = native.match(*whole)
    found = memory.extend(tail_q, tail_k)
    assert memory.starts.tolist() == [start]
    np.testing.assert_array_equal(found.length, length[..., -300:])
    absolute = np.where(position >= 0, position + start, -1)
    np.testing.assert_array_equal(found.position, absolute[..., -300:])
    with pytest.raises(InvalidInputError, match="max_bytes"):
        SuffixMemory(1, 64, bits=4, max_bytes=1000)
