"""The GPU engine on a GPU: against the oracle and the plain forms, graphs, streams, determinism."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from rosakit import cuda, symbols
from rosakit.ops import rosa, suffix_match
from rosakit.ops.estimators.counterfactual import credit_naive
from rosakit.ops.oracle import suffix_match_oracle
from tests.cuda.test_match_emulated import pairs, segments

retrieve_ops = importlib.import_module("rosakit.ops.retrieve")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not cuda.available(), reason=f"the GPU engine cannot run: {cuda.unavailable_reason()}"
    ),
]


def check(length, bits, flips, seed, starts=None, **rules):
    q, k = (torch.from_numpy(x) for x in pairs(length, bits, seed))
    starts = None if starts is None else torch.from_numpy(starts)
    expected = suffix_match_oracle(q, k, segment_starts=starts, counterfactual_bits=flips, **rules)
    got = cuda.match(
        q.cuda(),
        k.cuda(),
        segment_starts=None if starts is None else starts.cuda(),
        counterfactual_bits=flips,
        **rules,
    )
    for name, mine, right in zip(("position", "length", "flips"), got, expected, strict=True):
        if right is not None:
            assert torch.equal(mine.cpu(), right), name


@pytest.mark.parametrize("length", [1, 2, 63, 64, 1000])
@pytest.mark.parametrize("bits, flips", [(4, 4), (1, 0), (8, 8)])
def test_match_equals_the_oracle(length, bits, flips):
    check(length, bits, flips, length)


@pytest.mark.parametrize(
    "rules",
    [{"max_length": 3}, {"max_length": 40}, {"min_length": 5}, {"min_length": 2, "max_length": 9}],
)
def test_options(rules):
    check(500, 2, 2, 1, **rules)
    check(500, 4, 4, 2, starts=segments(500, 2), **rules)


@pytest.mark.parametrize("successor", ["available", "strict"])
@pytest.mark.parametrize("length, bits, flips", [(1, 4, 0), (63, 4, 4), (1000, 1, 1), (300, 8, 8)])
def test_runs(successor, length, bits, flips):
    rules = {"granularity": "run", "successor": successor}
    check(length, bits, flips, length, **rules)
    check(length, bits, flips, 2, starts=segments(length, 3), max_length=30, **rules)


@pytest.mark.parametrize("dtype, bits", [(torch.uint16, 12), (torch.int32, 17)])
@pytest.mark.parametrize("length", [1, 65, 1500])
def test_wide_symbols(dtype, bits, length):
    names = torch.randperm(1 << bits, generator=torch.Generator().manual_seed(0))[:32]
    q, k = (names[torch.from_numpy(x).long() % 32].to(dtype) for x in pairs(length, 5, bits))
    flips = 0 if dtype == torch.int32 else bits
    starts = torch.from_numpy(segments(length, 1)) if length > 100 else None
    expected = suffix_match_oracle(q, k, segment_starts=starts, counterfactual_bits=flips)
    got = cuda.match(
        q.cuda(),
        k.cuda(),
        segment_starts=None if starts is None else starts.cuda(),
        counterfactual_bits=flips,
    )
    for mine, right in zip(got, expected, strict=True):
        assert right is None or torch.equal(mine.cpu(), right)


@pytest.mark.parametrize("length", [20000, 40000, 70000])
def test_flips_in_global_memory_equal_the_core(length):
    """Beyond 16384 positions entries are in global memory and a flip is noted before it is read."""
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randint(0, 16, (2, 1, 3, length), generator=generator, dtype=torch.uint8)
    k[0, 1] = k[0, 0, : length // 3].repeat(4)[:length]
    q[0, 1] = k[0, 1]
    q[0, 2], k[0, 2] = 3, 3
    starts = torch.zeros(1, length, dtype=torch.int32)
    starts[0, length // 2 :] = length // 2
    for options in ({}, {"segment_starts": starts}, {"min_length": 3, "max_length": 40}):
        right = suffix_match(q, k, counterfactual_bits=4, backend="cpu", **options)
        on_gpu = {
            name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()
        }
        mine = suffix_match(q.cuda(), k.cuda(), counterfactual_bits=4, backend="cuda", **on_gpu)
        for a, b in zip(mine, right, strict=True):
            assert torch.equal(a.cpu(), b)


def test_rows_of_a_batch_have_their_own_segments():
    q, k = (torch.from_numpy(x).cuda() for x in pairs(300, 4, 5))
    q, k = (x.reshape(1, -1, 300).repeat(2, 1, 1) for x in (q, k))
    starts = np.concatenate([segments(300, 1), segments(300, 2)])
    expected = suffix_match_oracle(q.cpu(), k.cpu(), segment_starts=torch.from_numpy(starts))
    position, length, _ = cuda.match(q, k, segment_starts=torch.from_numpy(starts).cuda())
    assert torch.equal(position.cpu(), expected.position)
    assert torch.equal(length.cpu(), expected.length)


def test_non_contiguous_inputs_and_other_streams():
    q, k = (torch.from_numpy(x).cuda() for x in pairs(400, 4, 7))
    wide_q, wide_k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    expected = cuda.match(q, k, counterfactual_bits=4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = cuda.match(wide_q, wide_k, counterfactual_bits=4)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_graph_captures_a_whole_step():
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 512, 64, device="cuda") for _ in range(4))
    e0, e1 = torch.randn(64, device="cuda"), torch.randn(64, device="cuda")

    def step():
        packed = [cuda.pack(x, 4) for x in (q, k)]
        position, _, flipped = cuda.match(*packed, counterfactual_bits=4)
        y = cuda.retrieve_forward(v, position, e0, e1, None, 4, "zero")
        gradients = cuda.counterfactual_backward(
            grad, q, k, v, e0, e1, position, flipped, bits=4, deterministic=True
        )
        return y, *gradients

    step()  # compiles and loads, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in (q, k, v, grad):
        x.copy_(torch.randn_like(x))
    graph.replay()
    again = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits, length, routes", [(4, 257, 33), (3, 63, 5), (8, 100, 4)])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_credit_equals_the_plain_forms(dtype, bits, length, routes, unmatched, deterministic):
    torch.manual_seed(length)
    channels = routes * bits
    q, k, v, grad = (torch.randn(2, length, channels).to(dtype).cuda() for _ in range(4))
    e0, e1 = (torch.randn(channels).to(dtype).cuda() for _ in range(2))
    e_null = torch.randn(channels).to(dtype).cuda() if unmatched == "null" else None
    assert torch.equal(cuda.pack(q, bits), symbols.pack(q, bits))
    position, _, flipped = cuda.match(
        cuda.pack(q, bits), cuda.pack(k, bits), counterfactual_bits=bits
    )
    y = cuda.retrieve_forward(v, position, e0, e1, e_null, bits, unmatched)
    assert torch.equal(
        y, retrieve_ops.retrieve_forward(v, position, e0, e1, e_null, bits, unmatched)
    )
    rules = {"key_credit": "matched", "soft_values": True, "temperature": 1.0}
    options = {"bits": bits, "unmatched": unmatched, **rules}
    tensors = (grad, q, k, v, e0, e1, position, flipped)
    got = cuda.counterfactual_backward(*tensors, **options, deterministic=deterministic)
    expected = (
        *credit_naive(*tensors, None, granularity="token", **options),
        *retrieve_ops.retrieve_backward(grad, v, position, e0, e1, bits, unmatched),
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name, mine, right in zip(
        ("dq", "dk", "dv", "de0", "de1", "de_null"), got, expected, strict=True
    ):
        if name != "de_null" or unmatched == "null":
            error = (mine.double() - right.double()).norm()
            assert error <= tolerance * right.double().norm(), name
    if deterministic:
        again = cuda.counterfactual_backward(*tensors, **options, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_the_operator_gives_the_same_gradients_on_both_devices():
    torch.manual_seed(3)
    inputs = [torch.randn(1, 200, 32) for _ in range(3)] + [torch.randn(32), torch.randn(32)]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().clone().to(device).requires_grad_() for x in inputs]
        y = rosa(*leaves, bits=4)
        y.square().sum().backward()
        results.append([y, *(x.grad for x in leaves)])
    for mine, right in zip(results[1], results[0], strict=True):
        assert torch.allclose(mine.cpu(), right, rtol=1e-4, atol=1e-5)


def test_a_long_stream_equals_the_second_method():
    """131072 positions reach the global-memory structures and ranges that are kept apart."""
    length = 131072
    generator = torch.Generator().manual_seed(0)
    passage = torch.randint(0, 16, (4096,), generator=generator, dtype=torch.uint8)
    k = passage.repeat(length // 4096)
    changed = torch.rand(length, generator=generator) < 0.001
    k[changed] = (k[changed] + 1) % 16
    constant = torch.zeros(length, dtype=torch.uint8)
    both = torch.stack([k, constant])[None].cuda()
    position, size, _ = cuda.match(both, both)
    # Every match is one and could not be longer; the constant stream is known in closed form.
    index = torch.arange(length, device="cuda")
    assert torch.equal(size[0, 1], index.int())
    assert torch.equal(position[0, 1], torch.where(index > 0, index, -1).int())
    host, at, sizes = k.numpy(), position[0, 0].cpu().numpy(), size[0, 0].cpu().numpy()
    for i in range(17, length, 997):
        j, n = at[i] - 1, sizes[i]
        assert 0 <= j < i
        assert np.array_equal(host[i - n + 1 : i + 1], host[j - n + 1 : j + 1])
        assert n > j or host[i - n] != host[j - n]
