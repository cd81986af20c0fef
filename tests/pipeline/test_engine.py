"""The pipeline on CPU tensors: the same path as on a GPU, with plain copies."""

from __future__ import annotations

import threading

import pytest
import torch

from rosakit import native
from rosakit.errors import BackendError, InvalidInputError, InvalidTypeError
from rosakit.ops import suffix_match
from rosakit.pipeline import Pipeline, engine, wire
from rosakit.pipeline.job import parts_of

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled core is missing")


@pytest.fixture(scope="module")
def pipeline():
    made = Pipeline("cpu", depth=2, parts=3)
    yield made
    made.close()


def symbols(batch, routes, length, bits, seed=0, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(0, 1 << bits, (2, batch, routes, length), generator=generator)
    pair[1, ..., 1:] = torch.where(
        torch.rand(pair[0, ..., 1:].shape, generator=generator) < 0.5,
        pair[0, ..., 1:],
        pair[1, ..., 1:],
    )
    return pair.to(dtype).unbind(0)


def assert_same(got, expected):
    for name, mine, right in zip(got._fields, got, expected, strict=True):
        if right is None:
            assert mine is None
        else:
            assert mine.dtype == torch.int32
            assert torch.equal(mine, right), name


@pytest.mark.parametrize("length", [1, 2, 63, 200])
@pytest.mark.parametrize(
    "bits, dtype", [(1, torch.uint8), (4, torch.uint8), (7, torch.uint8), (12, torch.uint16)]
)
def test_the_same_match_as_the_operator(pipeline, length, bits, dtype):
    q, k = symbols(2, 5, length, bits, length, dtype)
    ticket = pipeline.submit(q, k, bits=bits, counterfactual_bits=min(bits, 4))
    assert_same(
        ticket.result(), suffix_match(q, k, counterfactual_bits=min(bits, 4), backend="cpu")
    )


def test_options_and_segments_are_passed_on(pipeline):
    q, k = symbols(2, 3, 90, 2, 5)
    starts = torch.zeros(2, 90, dtype=torch.int32)
    starts[0, 40:] = 40
    starts[1, :7] = -1
    starts[1, 7:] = 7
    options = {
        "granularity": "run",
        "successor": "strict",
        "max_length": 9,
        "min_length": 2,
        "segment_starts": starts,
        "counterfactual_bits": 2,
    }
    got = pipeline.submit(q, k, bits=2, **options).result()
    assert_same(got, suffix_match(q, k, backend="cpu", **options))


def test_tokens_and_other_layouts(pipeline):
    q = torch.randint(0, 9, (3, 40, 1), dtype=torch.int32).transpose(1, 2)
    assert_same(pipeline.submit(q, q).result(), suffix_match(q, q, backend="cpu"))
    empty = torch.zeros(1, 2, 0, dtype=torch.uint8)
    assert pipeline.submit(empty, empty).result().position.shape == (1, 2, 0)


def test_many_submissions_share_few_buffers(pipeline):
    """More under way than buffers: submit sleeps until one is free, results stay apart."""
    pairs = [symbols(1, 7, 50 + 30 * (i % 4), 4, i) for i in range(12)]
    tickets = [pipeline.submit(q, k, bits=4) for q, k in pairs]
    for ticket, (q, k) in reversed(list(zip(tickets, pairs, strict=True))):
        assert_same(ticket.result(), suffix_match(q, k, backend="cpu"))


def test_a_ticket_that_nobody_asks_leaves_its_buffers(pipeline):
    q, k = symbols(1, 4, 30, 4)
    for _ in range(8):
        pipeline.submit(q, k)
    assert_same(pipeline.submit(q, k).result(), suffix_match(q, k, backend="cpu"))


def test_submit_returns_before_the_match_and_the_queue_is_bounded(monkeypatch):
    """With the core held up, `depth` submissions return and the next one sleeps."""
    go, entered = threading.Event(), threading.Event()
    real = native.match_into

    def held_up(*args, **kwargs):
        entered.set()
        assert go.wait(20)
        real(*args, **kwargs)

    monkeypatch.setattr(native, "match_into", held_up)
    pipeline = Pipeline("cpu", depth=2, parts=1)
    q, k = symbols(1, 2, 20, 4)
    tickets = [pipeline.submit(q, k) for _ in range(2)]
    assert entered.wait(20)
    assert not any(t.done() for t in tickets)
    third = []
    thread = threading.Thread(target=lambda: third.append(pipeline.submit(q, k)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "a third submission must wait for a set of buffers"
    go.set()
    thread.join(20)
    assert not thread.is_alive()
    expected = suffix_match(q, k, backend="cpu")
    for ticket in (*tickets, *third):
        assert_same(ticket.result(), expected)
    pipeline.close()


@pytest.mark.parametrize("where", ["match_into", "unpack"])
def test_errors_reach_the_caller_and_the_pipeline_goes_on(monkeypatch, pipeline, where):
    q, k = symbols(1, 6, 20, 4)

    def broken(*_, **__):
        raise RuntimeError("no more memory in the core")

    owner = native if where == "match_into" else wire
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, broken)
        tickets = [pipeline.submit(q, k, bits=4) for _ in range(3)]
        for ticket in tickets:
            with pytest.raises(RuntimeError, match="no more memory"):
                ticket.result()
            with pytest.raises(RuntimeError, match="no more memory"):
                ticket.result()
    assert_same(pipeline.submit(q, k).result(), suffix_match(q, k, backend="cpu"))


def test_refusals(pipeline):
    q, k = symbols(1, 2, 10, 4)
    with pytest.raises(InvalidInputError, match="one shape"):
        pipeline.submit(q, k[..., :5])
    with pytest.raises(InvalidTypeError, match="uint8"):
        pipeline.submit(q.long(), k.long())
    with pytest.raises(InvalidInputError, match="segment_starts"):
        pipeline.submit(q, k, segment_starts=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(InvalidInputError, match="depth"):
        Pipeline("cpu", depth=0)
    with pytest.raises(BackendError, match="meta"):
        Pipeline("meta")
    with pytest.raises(InvalidInputError, match="granularity"):
        pipeline.submit(q, k, granularity="word").result()


def test_parts_cover_every_stream_once_and_stay_in_their_row():
    for batch, routes, wanted in ((1, 512, 8), (3, 5, 4), (2, 7, 100), (4, 1, 2)):
        parts = parts_of(batch, routes, wanted)
        covered = [s for p in parts for s in range(p.begin, p.end)]
        assert covered == list(range(batch * routes))
        assert all(p.begin // routes == p.row == (p.end - 1) // routes for p in parts)


def test_packed_symbols_come_back():
    for length in (1, 2, 7, 64):
        x = torch.randint(0, 16, (3, length), dtype=torch.uint8)
        packed = wire.pack(x, 4)
        assert packed.shape == (3, (length + 1) // 2)
        assert torch.equal(torch.from_numpy(wire.unpack(packed.numpy(), length)), x)


def test_the_shared_pipeline_is_one_a_device():
    assert engine.shared(torch.device("cpu")) is engine.shared(torch.device("cpu"))
