"""The sweep over single-bit flips on a GPU: against the CPU core, inside the estimator, no sync."""

from __future__ import annotations

import pytest
import torch

from rosakit import cuda, native
from rosakit.native import bitflip as native_bitflip
from rosakit.ops import rosa
from rosakit.ops.estimators.bitflip_credit import credit_core, credit_gpu, credit_naive
from rosakit.ops.estimators.registry import MatchOptions
from tests.cuda.test_bitflip_emulated import example, packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not cuda.available(), reason=f"the GPU engine cannot run: {cuda.unavailable_reason()}"
    ),
]
needs_core = pytest.mark.skipif(
    not native.available() or not native_bitflip.built(), reason="compiled core missing or old"
)


def on_gpu(match):
    starts = match.segment_starts
    return match._replace(segment_starts=None if starts is None else starts.cuda())


@needs_core
@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize(
    "length, bits", [(1, 1), (127, 1), (127, 4), (300, 8), (1100, 2), (2100, 4), (5000, 1)]
)
def test_gpu_and_core_agree_to_the_last_bit(length, bits, unmatched, tied):
    """Same terms in the same order; lengths that reach every thread count and memory plan."""
    for dtype in (torch.float32, torch.float64):
        q, k, v, grad, e0, e1, e_null = example(length, bits, length + bits, dtype)
        q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
        match = MatchOptions(
            segment_starts=packed(length) if bits > 1 else None,
            max_length=3 if bits == 8 else None,
            min_length=2 if bits == 2 else 1,
        )
        null = e_null if unmatched == "null" else None
        tensors = (grad, q, k, v, e0, e1, null)
        options = {"bits": bits, "unmatched": unmatched, "tied": tied}
        expected = credit_core(*tensors, match=match, **options)
        got = credit_gpu(
            *(None if x is None else x.cuda() for x in tensors), match=on_gpu(match), **options
        )
        for name, a, b in zip(("q", "k"), got, expected, strict=True):
            assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
def test_gpu_is_the_definition(tied):
    q, k, v, grad, e0, e1, _ = (x.cuda() for x in example(60, 2, 5))
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    options = {"bits": 2, "match": MatchOptions(), "unmatched": "zero", "tied": tied}
    expected = credit_naive(grad, q, k, v, e0, e1, None, **options)
    got = credit_gpu(grad, q, k, v, e0, e1, None, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_run_granularity_on_a_gpu():
    """The kernel leaves it to flipped copies through the matcher; same numbers as on the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        q, k, v, grad, e0, e1, _ = (x.to(device) for x in example(30, 2, 6))
        q = q.requires_grad_()
        y = rosa(q, k, v, e0, e1, bits=2, estimator="bitflip", granularity="run")
        results.append(torch.autograd.grad(y, q, grad)[0].cpu())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_waits_for_nothing(tied):
    """Forward and backward without one synchronisation with the host."""
    q, k, v, grad, e0, e1, _ = (x.float().cuda() for x in example(200, 4, 9))
    if tied:
        q = v = k
    leaves = [x.requires_grad_() for x in ((k, e0, e1) if tied else (q, k, v, e0, e1))]

    def step():
        y = rosa(q, k, v, e0, e1, bits=4, estimator="bitflip", tied=tied)
        return torch.autograd.grad(y, leaves, grad)

    first = step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(first, second)  # v's scatter adds in any order


def test_a_long_stream_runs():
    """16384 positions: arrays in scratch, the estimator's gradient finite and not zero."""
    g = torch.Generator().manual_seed(0)
    q, v, grad = (torch.randn(1, 16384, 16, generator=g).cuda() for _ in range(3))
    k = torch.where(torch.rand(q.shape, generator=g).cuda() < 0.05, -q, q).requires_grad_()
    e0, e1 = -torch.ones(16).cuda(), torch.ones(16).cuda()
    y = rosa(q, k, v, e0, e1, bits=4, estimator="bitflip")
    (dk,) = torch.autograd.grad(y, k, grad)
    assert dk.isfinite().all()
    assert dk.count_nonzero() > 1000
