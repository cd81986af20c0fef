"""The bitflip estimator against its definition and RWKV-8's reference gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from rosakit import native
from rosakit.errors import InvalidInputError
from rosakit.native import bitflip as native_bitflip
from rosakit.ops import rosa
from rosakit.ops.estimators import bitflip_credit
from rosakit.ops.estimators.bitflip import slope_of
from rosakit.ops.estimators.bitflip_credit import credit, credit_core, credit_naive
from rosakit.ops.estimators.registry import MatchOptions
from rosakit.symbols import pack, unpack
from tests.ops import brute
from tests.streams import FAMILIES, make

needs_core = pytest.mark.skipif(
    not native.available() or not native_bitflip.built(), reason="compiled core missing or old"
)


def example(length=21, routes=2, bits=2, batch=1, seed=0, family="markov", noise=0.2):
    """q, k, v, e0, e1, gradient in float64; k is a named stream, q a noisy copy."""
    g = torch.Generator().manual_seed(seed)
    streams = [
        np.resize(make(family, length, 2**bits, seed + n), length) for n in range(batch * routes)
    ]
    k = torch.stack([torch.from_numpy(s) for s in streams]).view(batch, routes, length)
    fresh = torch.randint(0, 2**bits, k.shape, generator=g)
    q = torch.where(torch.rand(k.shape, generator=g) < noise, fresh, k)
    size = torch.rand(2, batch, length, routes * bits, generator=g, dtype=torch.float64) + 0.1
    q, k = (s * (unpack(x, bits).double() * 2 - 1) for s, x in zip(size, (q, k), strict=True))
    v, grad = torch.randn(2, *q.shape, generator=g, dtype=torch.float64)
    e0, e1 = torch.randn(2, routes * bits, generator=g, dtype=torch.float64)
    return q, k, v, e0, e1, grad


def definition(q, k, v, e0, e1, grad, bits, max_length, min_length):
    """Credit of q and k of one stream, by plain loops that share nothing with the package."""
    symbols = [pack(x, bits)[0, 0].tolist() for x in (q, k)]
    values = torch.where(v[0] > 0, e1, e0)

    def loss(q, k):
        position, _, _ = brute.match_tokens(q, k, max_length=max_length, min_length=min_length)
        return sum(float(grad[0, t] @ values[p]) for t, p in enumerate(position) if p >= 0)

    now = loss(*symbols)
    credit = torch.zeros(2, len(symbols[0]), bits, dtype=torch.float64)
    for which in (0, 1):
        for u in range(len(symbols[0])):
            for m in range(bits):
                flipped = [list(s) for s in symbols]
                flipped[which][u] ^= 1 << m
                credit[which, u, m] = loss(*flipped) - now
    return credit


@pytest.mark.parametrize("max_length, min_length", [(None, 1), (3, 1), (None, 2)])
def test_naive_is_the_definition(max_length, min_length):
    for length, bits, seed in ((1, 1, 0), (2, 2, 1), (17, 2, 2), (13, 3, 3)):
        q, k, v, e0, e1, grad = example(length, 1, bits, seed=seed)
        match = MatchOptions(max_length=max_length, min_length=min_length)
        got = credit_naive(grad, q, k, v, e0, e1, None, bits=bits, match=match, unmatched="zero")
        expected = definition(q, k, v, e0, e1, grad, bits, max_length, min_length)
        for name, a, b in zip(("q", "k"), got, expected, strict=True):
            torch.testing.assert_close(a[0], b, msg=lambda m, n=name: f"credit of {n}: {m}")


@needs_core
@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    length=st.sampled_from([1, 2, 9, 21, 33]),
    shape=st.sampled_from([(1, 1), (2, 2), (1, 4)]),
    family=st.sampled_from(FAMILIES),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    max_length=st.sampled_from([None, 1, 3, 8]),
    min_length=st.sampled_from([1, 2]),
    unmatched=st.sampled_from(["zero", "self", "null"]),
    packed=st.booleans(),
    tied=st.sampled_from(["none", "qk", "qkv"]),
)
def test_sweeps_are_the_naive_form(
    seed, length, shape, family, noise, max_length, min_length, unmatched, packed, tied
):
    routes, bits = shape
    q, k, v, e0, e1, grad = example(length, routes, bits, 2, seed % 999, family, noise)
    starts = None
    if packed and length > 8:
        starts = torch.zeros(2, length, dtype=torch.int32)
        starts[:, length // 2 :] = length // 2
        starts[:, -2:] = -1
    match = MatchOptions(
        max_length=max_length,
        min_length=min(min_length, max_length or min_length),
        segment_starts=starts,
    )
    e_null = e0.flip(0) if unmatched == "null" else None
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    options = {"bits": bits, "match": match, "unmatched": unmatched, "tied": tied}
    expected = credit_naive(grad, q, k, v, e0, e1, e_null, **options)
    got = credit_core(grad, q, k, v, e0, e1, e_null, **options)
    for name, a, b in zip(("q", "k"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_minus_sign_credit_slope():
    q, k, v, e0, e1, grad = example(19)
    leaves = [x.requires_grad_() for x in (q, k, v, e0, e1)]
    y, match = rosa(*leaves, bits=2, estimator="bitflip", return_match=True)
    got = torch.autograd.grad(y, leaves, grad)
    credit = credit_naive(
        grad, q, k, v, e0, e1, None, bits=2, match=MatchOptions(), unmatched="zero"
    )
    for name, d, c, x in zip(("dq", "dk"), got, credit, (q, k), strict=False):
        expected = -x.sign() * c / (2 * (1 + x.abs()) ** 2)
        torch.testing.assert_close(d, expected, msg=lambda m, n=name: f"{n}: {m}")
    # v: its flip's credit, by the definition.
    dv = torch.zeros_like(v)
    for t in range(v.shape[1]):
        for r in range(2):
            at = int(match.position[0, r, t])
            if at >= 0:
                dv[0, at, 2 * r : 2 * r + 2] += (grad[0, t] * (e1 - e0))[2 * r : 2 * r + 2]
    torch.testing.assert_close(got[2], dv / (2 * (1 + v.abs()) ** 2))
    # e0, e1: exact derivatives of the forward.
    hard = [x.detach().requires_grad_(n > 2) for n, x in enumerate(leaves)]
    exact = torch.autograd.grad(rosa(*hard, bits=2), hard[3:], grad)
    torch.testing.assert_close(got[3:], exact)


def test_rwkv8_1bit_layer(golden):
    """RWKV-8's ROSA_1bit backward: one tensor is q, k and v, and a flip flips all three."""
    data = golden("layer_1bit")
    for n in range(int(data["n"])):
        name = f"c{n:02d}_"
        x, e0, e1, gy, gx = (
            torch.from_numpy(data[name + key]) for key in ("x", "emb0", "emb1", "gy", "gx")
        )
        x = x.requires_grad_()
        e0, e1 = (e.flatten().requires_grad_() for e in (e0, e1))
        y = rosa(
            x, x, x, e0, e1, bits=1, estimator="bitflip", slope="inverse", floor=1e-3, tied=True
        )
        torch.testing.assert_close(y, torch.from_numpy(data[name + "out"]), rtol=0, atol=0)
        y.backward(gy)
        torch.testing.assert_close(x.grad, gx, rtol=1e-4, atol=1e-4)
        for e, key in ((e0, "gemb0"), (e1, "gemb1")):
            expected = torch.from_numpy(data[name + key]).flatten()
            torch.testing.assert_close(e.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
@pytest.mark.parametrize("stride", [4, 5])
def test_sampling_is_unbiased(stride, tied):
    """The mean over every phase of the antithetic combs is the exact credit."""
    q, k, v, e0, e1, grad = example(15)
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    options = {"bits": 2, "match": MatchOptions(), "unmatched": "zero", "tied": tied}
    exact = credit_naive(grad, q, k, v, e0, e1, None, **options)
    sampled = [
        credit_naive(
            grad, q, k, v, e0, e1, None, phases=(p, stride - 1 - p), stride=stride, **options
        )
        for p in range(stride)
    ]
    for which in (0, 1) if tied == "none" else (0,):
        mean = torch.stack([s[which] for s in sampled]).mean(0)
        torch.testing.assert_close(mean, exact[which])
        assert (sampled[0][which] == 0).sum() > (exact[which] == 0).sum()


@needs_core
@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
@pytest.mark.parametrize("stride", [2, 5, 8, 60])
def test_a_sample_is_the_same_however_it_is_found(stride, tied, monkeypatch):
    """Flip by flip, or left over from the one sweep; odd strides draw one comb twice."""
    q, k, v, e0, e1, grad = example(33, 2, 3, batch=2)
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    starts = torch.zeros(2, 33, dtype=torch.int32)
    starts[:, 20:] = 20
    starts[1, 30:] = -1
    options = {"bits": 3, "match": MatchOptions(segment_starts=starts), "unmatched": "zero"}
    for phase in {0, stride // 2, stride - 1}:
        arguments = (grad, q, k, v, e0, e1, None)
        monkeypatch.setattr(bitflip_credit, "SWEEP_FLIPS", 0)  # every sample counts as few flips
        one_by_one = credit(*arguments, **options, tied=tied, phase=phase, stride=stride)
        monkeypatch.setattr(bitflip_credit, "SWEEP_FLIPS", 10**6)
        swept = credit(*arguments, **options, tied=tied, phase=phase, stride=stride)
        for a, b in zip(swept, one_by_one, strict=True):
            torch.testing.assert_close(a, b)
        assert one_by_one[0].any()


@needs_core
def test_few_flips_of_a_long_stream_are_matched_one_by_one(monkeypatch):
    """The sweep takes all pairs of positions: a sample of few flips must not pay for it.

    Routes flip together, so their number makes a sample no larger.
    """
    q, k, v, e0, e1, grad = example(400, 3, 1)

    def refuse(*_, **__):
        raise AssertionError("swept")

    def gradient(stride):
        y = rosa(q.requires_grad_(), k, v, e0, e1, bits=1, estimator="bitflip", stride=stride)
        return torch.autograd.grad(y, q, grad)[0]

    monkeypatch.setattr(bitflip_credit, "credit_core", refuse)
    assert gradient(200).shape == q.shape  # 8 flips
    with pytest.raises(AssertionError, match="swept"):
        gradient(100)  # 16 flips, more than 400 / 32


def test_random_phases_converge_to_the_exact_gradient():
    """What training sees: the mean of many sampled gradients nears the exact one as 1 / sqrt(n)."""
    q, k, v, e0, e1, grad = example(12, 1, 1)
    k = k.requires_grad_()

    def gradient(**options):
        y = rosa(q, k, v, e0, e1, bits=1, estimator="bitflip", **options)
        return torch.autograd.grad(y, k, grad)[0]

    torch.manual_seed(0)
    drawn = torch.stack([gradient(stride=6) for _ in range(300)])
    error = drawn.mean(0) - gradient()
    spread = drawn.std(0) / 300**0.5
    assert (error.abs() <= 4 * spread + 1e-12).all()
    assert spread.max() > 0


def test_sampled_gradient_uses_a_random_comb():
    q, k, v, e0, e1, grad = example(40)
    q = q.requires_grad_()
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        y = rosa(q, k, v, e0, e1, bits=2, estimator="bitflip", stride=8)
        (dq,) = torch.autograd.grad(y, q, grad)
        seen.add(tuple(dq.flatten().nonzero().flatten().tolist()))
    assert len(seen) > 1


def test_run_granularity_flips_runs():
    q, k, v, e0, e1, grad = example(16, 1, 1, seed=4)
    q = q.requires_grad_()
    y = rosa(q, k, v, e0, e1, bits=1, estimator="bitflip", granularity="run")
    (dq,) = torch.autograd.grad(y, q, grad)
    for u in range(16):
        flipped = q.detach().clone()
        flipped[0, u] *= -1
        change = rosa(flipped, k, v, e0, e1, bits=1, granularity="run") - y
        expected = -(change * grad).sum() * slope_of(q[0, u, 0], "softsign", 1.0)
        torch.testing.assert_close(dq[0, u, 0], expected.detach())


def test_low_precision_and_checkpointing():
    q, k, v, e0, e1, grad = example(33, 2, 4)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v, e0, e1)]
        y = checkpoint(
            lambda *x: rosa(*x, bits=4, estimator="bitflip"), *leaves, use_reentrant=False
        )
        results.append(torch.autograd.grad(y, leaves, grad.bfloat16().to(dtype)))
    for name, low, high in zip(("dq", "dk", "dv", "de0", "de1"), *results, strict=True):
        error = (low.double() - high).norm() / high.norm()
        assert error < 2e-2, name


def test_opcheck_and_fullgraph_compile():
    q, k, v, e0, e1, _ = (x.float() for x in example(9))
    leaves = [x.requires_grad_() for x in (q, k, v, e0, e1)]
    phase = torch.zeros(1, dtype=torch.int64)
    matching = (2, "token", "available", 0, 1, "auto")
    torch.library.opcheck(
        torch.ops.rosakit.bitflip.default,
        (*leaves, None, None, phase, *matching, "zero", "softsign", 1e-3, "none", 1),
    )
    compiled = torch.compile(
        lambda *x: rosa(*x, bits=2, estimator="bitflip"), fullgraph=True, backend="aot_eager"
    )
    plain = rosa(*leaves, bits=2, estimator="bitflip")
    expected = torch.autograd.grad(plain.square().sum(), leaves[:3])
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves[:3])
    torch.testing.assert_close(got, expected)


def test_bad_options_are_refused():
    q, k, v, e0, e1, _ = example()
    for options, message in (
        ({"slope": "steep"}, "slope must be"),
        ({"floor": 0.0}, "floor must be positive"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"tied": "kv"}, "tied must be a bool, 'qk' or 'qkv'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            rosa(q, k, v, e0, e1, bits=2, estimator="bitflip", **options)
