"""The counterfactual estimator against its definition, written as loops over positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rosakit.errors import InvalidInputError
from rosakit.ops import rosa
from rosakit.ops.estimators.counterfactual import _credit_sources, _run_starts
from rosakit.ops.oracle import suffix_match_oracle
from rosakit.symbols import pack
from tests.ops import brute


def example(length=21, routes=2, bits=2, batch=1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, routes * bits)
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    k = torch.where(torch.rand(shape, generator=g) < 0.8, q, k)  # so that matches exist
    e0, e1 = torch.randn(2, routes * bits, generator=g).to(dtype)
    return q, k, v, e0, e1


def definition(q, k, v, e0, e1, grad, *, bits, granularity, key_credit, soft_values, unmatched):
    """dq, dk, dv of semantics 3.1 for ``[1, T, C]``, one term at a time."""
    length, channels = q.shape[1:]
    dq, dk, dv = (torch.zeros_like(x[0]) for x in (q, k, v))
    theta = grad[0] * (e1 - e0)
    slope = [x[0].sigmoid() * (1 - x[0].sigmoid()) for x in (q, k, v)]
    vf = v[0].sigmoid() if soft_values else (v[0] > 0).to(v.dtype)
    q_symbols, k_symbols = (pack(x, bits)[0].tolist() for x in (q, k))
    solve = brute.match_tokens if granularity == "token" else brute.match_runs
    for r in range(channels // bits):
        span = slice(r * bits, (r + 1) * bits)
        position, _, flipped = solve(q_symbols[r], k_symbols[r], bits=bits)
        run_start = [s for s, _ in brute.collapse(k_symbols[r])]

        def credited(at, run_start=run_start):
            if key_credit == "successor":
                return at
            if granularity == "token":
                return at - 1
            return max(s for s in run_start if s <= at - 1)

        def read(at, t, span=span):
            if at < 0 and unmatched != "self":
                return 0.0
            return (theta[t, span] * vf[t if at < 0 else at, span]).sum()

        for t in range(length):
            at = position[t] if position[t] >= 0 or unmatched != "self" else t
            if at >= 0:
                dv[at, span] += slope[2][at, span] * theta[t, span]
            for m in range(bits):
                bit = (q_symbols[r][t] >> m) & 1
                at = {bit: position[t], 1 - bit: flipped[t][m]}
                c = r * bits + m
                dq[t, c] += slope[0][t, c] * (read(at[1], t) - read(at[0], t))
                for b in (0, 1):
                    if at[b] >= 0:
                        key = credited(at[b])
                        dk[key, c] += (2 * b - 1) * slope[1][key, c] * read(at[b], t)
    return dq, dk, dv


@pytest.mark.parametrize("granularity", ["token", "run"])
@pytest.mark.parametrize("key_credit", ["matched", "successor"])
@pytest.mark.parametrize("soft_values", [True, False])
@pytest.mark.parametrize("unmatched", ["zero", "self"])
def test_gradients_are_the_definition(granularity, key_credit, soft_values, unmatched):
    for length, routes, bits, seed in ((1, 1, 1, 0), (2, 1, 2, 1), (23, 2, 2, 2), (31, 1, 3, 3)):
        q, k, v, e0, e1 = example(length, routes, bits, seed=seed)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        y = rosa(
            q,
            k,
            v,
            e0,
            e1,
            bits=bits,
            granularity=granularity,
            unmatched=unmatched,
            key_credit=key_credit,
            soft_values=soft_values,
        )
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, (q, k, v), grad)
        expected = definition(
            *(x.detach() for x in (q, k, v, e0, e1)),
            grad,
            bits=bits,
            granularity=granularity,
            key_credit=key_credit,
            soft_values=soft_values,
            unmatched=unmatched,
        )
        for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
            torch.testing.assert_close(a[0], b, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_rows_equal_rows_alone():
    parts = [example(length, seed=length) for length in (13, 8)]
    e0, e1 = parts[0][3:]
    alone = []
    for q, k, v, _, _ in parts:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = rosa(*leaves, e0, e1, bits=2, granularity="run")
        alone.append((y, torch.autograd.grad(y.square().sum(), leaves)))
    leaves = [torch.cat([parts[0][n], parts[1][n]], dim=1).requires_grad_() for n in range(3)]
    y = rosa(*leaves, e0, e1, bits=2, granularity="run", cu_seqlens=[0, 13, 21])
    grads = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(y, torch.cat([a[0] for a in alone], dim=1))
    for n in range(3):
        torch.testing.assert_close(grads[n], torch.cat([a[1][n] for a in alone], dim=1))


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
def test_low_precision_accumulates_in_float32(dtype, ratio):
    q, k, v, e0, e1 = (x.to(dtype) for x in example(100, 4, 4, batch=2))
    results = []
    for cast in (dtype, torch.float64):
        leaves = [x.to(cast).requires_grad_() for x in (q, k, v, e0, e1)]
        y = rosa(*leaves, bits=4)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(cast)
        results.append(torch.autograd.grad(y, leaves, grad))
    for name, got, expected in zip(("dq", "dk", "dv", "de0", "de1"), *results, strict=True):
        assert relative_error(got, expected) < ratio, name


def test_match_is_the_oracle_and_saved_state_is_int32():
    q, k, v, e0, e1 = example(40, 3, 4)
    saved = []

    def keep(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y, match = rosa(q.requires_grad_(), k, v, e0, e1, bits=4, return_match=True)
    expected = suffix_match_oracle(pack(q, 4), pack(k, 4), counterfactual_bits=4)
    assert torch.equal(match.position, expected.position)
    assert torch.equal(match.cf_position, expected.cf_position)
    integers = [x for x in saved if not x.is_floating_point()]
    assert integers
    assert all(x.dtype == torch.int32 for x in integers)
    assert max(x.numel() for x in saved) <= y.numel()


def test_no_gradient_asked_no_flips_searched():
    q, k, v, e0, e1 = example()
    _, match = rosa(q, k, v.requires_grad_(), e0, e1, bits=2, return_match=True)
    assert match.cf_position is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same(use_reentrant):
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(40, 2, 4))
    plain = rosa(q, k, v, e0, e1, bits=4)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v, e0, e1))
    again = checkpoint(lambda *x: rosa(*x, bits=4), q, k, v, e0, e1, use_reentrant=use_reentrant)
    again.square().sum().backward()
    for leaf, gradient in zip((q, k, v, e0, e1), expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_opcheck_and_fullgraph_compile():
    q, k, v, e0, e1 = (x.float().requires_grad_() for x in example(17, 2, 2))
    arguments = (q, k, v, e0, e1, None, None, 2, "token", "available", 0, 1, "auto", "zero", True)
    torch.library.opcheck(
        torch.ops.rosakit.counterfactual.default, (*arguments, "matched", True, 1.0)
    )
    compiled = torch.compile(lambda *x: rosa(*x, bits=2), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(rosa(q, k, v, e0, e1, bits=2).square().sum(), (q, k, v))
    got = torch.autograd.grad(compiled(q, k, v, e0, e1).square().sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_credit_sources_invert_run_starts(packed):
    """What the fused kernel reads per key is what the naive form scatters per match."""
    keys = torch.randint(0, 3, (2, 3, 40), dtype=torch.uint8)
    segment_starts = None
    if packed:
        segment_starts = torch.tensor([0] * 17 + [17] * 23, dtype=torch.int32).expand(2, 40)
    sources = _credit_sources(keys, segment_starts)
    starts = _run_starts(keys, segment_starts)
    pairs = {(b, r, s, int(n)) for (b, r, s), n in np.ndenumerate(sources.numpy()) if n >= 0}
    expected = {
        (b, r, int(starts[b, r, n - 1]), n)
        for (b, r, n), s in np.ndenumerate(starts.numpy())
        if n > 0 and s == n
    }
    assert pairs == expected


def test_bad_options_are_refused():
    q, k, v, e0, e1 = example()
    with pytest.raises(InvalidInputError, match="does not take tau; its options are key_credit"):
        rosa(q, k, v, e0, e1, bits=2, tau=1.0)
    with pytest.raises(InvalidInputError, match=r"unknown estimator 'magic'; .*counterfactual"):
        rosa(q, k, v, e0, e1, bits=2, estimator="magic")
    with pytest.raises(InvalidInputError, match="key_credit"):
        rosa(q, k, v, e0, e1, bits=2, key_credit="nobody")
    with pytest.raises(InvalidInputError, match="temperature"):
        rosa(q, k, v, e0, e1, bits=2, temperature=0.0)
    with pytest.raises(InvalidInputError, match="do not divide into routes"):
        rosa(q, k, v, e0, e1, bits=3)
