"""The pipeline between a GPU and the core: results, streams, reuse of buffers, errors, refusals."""

from __future__ import annotations

import pytest
import torch

from rosakit import native, pipeline
from rosakit.errors import BackendError
from rosakit.ops import rosa, suffix_match
from rosakit.ops.ahead import begin
from rosakit.pipeline import Pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif(not native.available(), reason="the compiled core is missing"),
]


def symbols(batch, routes, length, bits, seed, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(0, 1 << bits, (2, batch, routes, length), generator=generator)
    return pair.to(dtype).unbind(0)


def assert_same(got, expected):
    for mine, right in zip(got, expected, strict=True):
        assert (mine is None and right is None) or torch.equal(mine.cpu(), right)


@pytest.mark.parametrize("length", [1, 63, 1000])
@pytest.mark.parametrize("bits, dtype", [(4, torch.uint8), (8, torch.uint8), (12, torch.uint16)])
def test_the_same_match(length, bits, dtype):
    q, k = symbols(2, 33, length, bits, length, dtype)
    made = Pipeline("cuda", parts=5)
    got = made.submit(q.cuda(), k.cuda(), bits=bits, counterfactual_bits=bits).result()
    assert_same(got, suffix_match(q, k, counterfactual_bits=bits, backend="cpu"))
    made.close()


def test_segments_runs_and_many_submissions():
    """Buffers and device memory are used again while earlier copies run."""
    made = Pipeline("cuda", depth=2, parts=3)
    for i in range(20):
        length = 300 + 200 * (i % 3)
        q, k = symbols(1, 16, length, 2, i)
        starts = torch.zeros(1, length, dtype=torch.int32)
        starts[0, 100:] = 100
        options = {"granularity": ("token", "run")[i % 2], "counterfactual_bits": 2}
        ticket = made.submit(q.cuda(), k.cuda(), bits=2, segment_starts=starts.cuda(), **options)
        if i % 4 == 3:
            continue  # nobody asks: its memory must not be reused too early
        got = ticket.result()
        assert_same(got, suffix_match(q, k, segment_starts=starts, backend="cpu", **options))
    made.close()


def test_other_streams():
    q, k = symbols(1, 64, 2000, 4, 1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        on_side = [x.cuda() for x in (q, k)]
        ticket = pipeline.shared(torch.device("cuda")).submit(*on_side, bits=4)
        del on_side
        got = ticket.result()
        total = got.position.sum()
    side.synchronize()
    right = suffix_match(q, k, backend="cpu")
    assert int(total) == int(right.position.sum())


def test_outputs_and_gradients_of_the_operator():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 500, 64) for _ in range(3)] + [torch.randn(64), torch.randn(64)]
    results = []
    for ahead in (True, False):
        leaves = [x.detach().clone().cuda().requires_grad_() for x in inputs]
        given = begin(leaves[0], leaves[1], bits=4) if ahead else None
        y = rosa(*leaves, bits=4, given=given)
        y.square().sum().backward()
        results.append([y, *(x.grad for x in leaves)])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_errors_come_from_the_threads_to_the_caller(monkeypatch):
    made = Pipeline("cuda")
    q, k = (x.cuda() for x in symbols(1, 8, 100, 4, 2))

    def broken(*_, **__):
        raise RuntimeError("no more memory in the core")

    with monkeypatch.context() as patch:
        patch.setattr(native, "match_into", broken)
        with pytest.raises(RuntimeError, match="no more memory"):
            made.submit(q, k, bits=4).result()
    assert_same(made.submit(q, k, bits=4).result(), suffix_match(q.cpu(), k.cpu(), backend="cpu"))
    made.close()


def test_graph_capture_is_refused():
    q, k = (x.cuda() for x in symbols(1, 8, 100, 4, 2))
    made = Pipeline("cuda")
    made.submit(q, k).result()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(BackendError, match="CUDA graph"), torch.cuda.graph(graph):
        made.submit(q, k)
    torch.cuda.synchronize()
    made.close()
