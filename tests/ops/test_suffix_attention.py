"""`suffix_attention`: hard forward, and a backward equal to the surrogate written pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rosakit.errors import InvalidInputError
from rosakit.ops import rosa
from rosakit.ops.value_heads import share_values


def example(length=15, routes=2, bits=2, batch=1, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, routes * bits)
    q, k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    k = torch.where(torch.rand(shape, generator=g) < 0.7, q, k)
    e0, e1 = torch.randn(2, routes * bits, generator=g).to(dtype)
    return q, k, v, e0, e1


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


def surrogate(
    q, k, v, e0, e1, *, bits, mismatch_scale=3.0, scale=1.0, window=None, unmatched="zero"
):
    """Semantics 3.3 for ``[1, T, M]`` and one route, as loops; y of the surrogate."""
    q, k, v = (Sign.apply(x[0]) for x in (q, k, v))
    value = e0 + (e1 - e0) * (v + 1) / 2
    length = q.shape[0]
    gate = {}
    for i in range(length):
        for j in range(i):
            mismatch = ((1 - q[i] * k[j]) / 2).mean()
            gate[i, j] = torch.exp(-mismatch_scale * mismatch)
    out = []
    for i in range(length):
        logits = [v.new_tensor(0.5 * scale)]
        for j in range(i):
            evidence, product = 0.0, 1.0
            for r in range(min(j + 1, window or length)):
                product = product * gate[i - r, j - r]
                evidence = evidence + product
            utility = (torch.sqrt(1 + evidence) - 1) / (math.sqrt(2) - 1)
            logits.append(scale * utility - math.log(i))
        p = torch.stack(logits).softmax(0)
        null = value[i] if unmatched == "self" else torch.zeros_like(value[i])
        out.append(p[0] * null + (p[1:] @ value[1 : i + 1] if i else 0))
    touched = 0 * (q.sum() + k.sum() + v.sum())  # T = 1 reads nothing
    return torch.stack(out)[None] + touched


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("unmatched", ["zero", "self"])
def test_backward_is_the_surrogate(window, unmatched):
    for length, bits, seed in ((1, 1, 0), (2, 2, 1), (13, 3, 2)):
        q, k, v, e0, e1 = example(length, 1, bits, seed=seed)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        options = {"bits": bits, "window": window, "mismatch_scale": 2.0, "scale": 1.5}
        y = rosa(*leaves, e0, e1, estimator="suffix_attention", unmatched=unmatched, **options)
        assert torch.equal(y, rosa(q, k, v, e0, e1, bits=bits, unmatched=unmatched))
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, leaves, grad)
        soft = surrogate(*leaves, e0, e1, unmatched=unmatched, **options)
        expected = torch.autograd.grad(soft, leaves, grad)
        for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_levels_get_the_hard_gradient():
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(30))
    hard = rosa(q, k, v, e0, e1, bits=2)
    soft = rosa(q, k, v, e0, e1, bits=2, estimator="suffix_attention")
    expected = torch.autograd.grad(hard.square().sum(), (e0, e1))
    torch.testing.assert_close(torch.autograd.grad(soft.square().sum(), (e0, e1)), expected)


def test_max_length_is_the_default_window():
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(20))
    grads = []
    for options in (
        {"max_length": 3},
        {"max_length": 3, "window": 3},
        {"max_length": 3, "window": 9},
    ):
        y = rosa(q, k, v, e0, e1, bits=2, estimator="suffix_attention", **options)
        grads.append(torch.autograd.grad(y.sum(), q)[0])
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[0], grads[2])


def test_packed_rows_equal_rows_alone():
    parts = [example(n, seed=n) for n in (9, 6)]
    e0, e1 = parts[0][3:]
    options = {"bits": 2, "estimator": "suffix_attention"}
    alone = []
    for q, k, v, _, _ in parts:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = rosa(*leaves, e0, e1, **options)
        alone.append((y, torch.autograd.grad(y.square().sum(), leaves)))
    leaves = [torch.cat([parts[0][n], parts[1][n]], dim=1).requires_grad_() for n in range(3)]
    y = rosa(*leaves, e0, e1, cu_seqlens=[0, 9, 15], **options)
    torch.testing.assert_close(y, torch.cat([a[0] for a in alone], dim=1))
    for n, grad in enumerate(torch.autograd.grad(y.square().sum(), leaves)):
        torch.testing.assert_close(grad, torch.cat([a[1][n] for a in alone], dim=1))


def test_dropout_is_backward_only_and_named_by_its_seed():
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(20))

    def grad(**options):
        y = rosa(q, k, v, e0, e1, bits=2, estimator="suffix_attention", **options)
        assert torch.equal(y, rosa(q, k, v, e0, e1, bits=2))
        return torch.autograd.grad(y.square().sum(), q)[0]

    one, two = torch.tensor([1]), torch.tensor([2])
    assert torch.equal(grad(dropout=0.4, seed=one), grad(dropout=0.4, seed=one))
    assert not torch.equal(grad(dropout=0.4, seed=one), grad(dropout=0.4, seed=two))
    assert not torch.equal(grad(dropout=0.4), grad(dropout=0.4))  # drawn anew
    torch.testing.assert_close(grad(dropout=0.0), grad())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_drops_the_same_weights(use_reentrant):
    q, k, v, e0, e1 = (x.requires_grad_() for x in example(20))

    def call(*x):
        return rosa(*x, bits=2, estimator="suffix_attention", dropout=0.4)

    torch.manual_seed(3)
    expected = torch.autograd.grad(call(q, k, v, e0, e1).square().sum(), (q, k, v))
    torch.manual_seed(3)
    y = checkpoint(call, q, k, v, e0, e1, use_reentrant=use_reentrant, preserve_rng_state=True)
    y.square().sum().backward()
    for leaf, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_value_heads_shared_by_routes_sum_their_gradients():
    q, k, _, e0, e1 = example(16, 4, 2)
    v = torch.randn(1, 16, 4, dtype=torch.float64).requires_grad_()  # 2 heads for 4 routes
    y = rosa(
        q.requires_grad_(), k, share_values(v, 2, 2), e0, e1, bits=2, estimator="suffix_attention"
    )
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, v, grad)
    wide = share_values(v.detach(), 2, 2).requires_grad_()
    y = rosa(q, k, wide, e0, e1, bits=2, estimator="suffix_attention")
    (each,) = torch.autograd.grad(y, wide, grad)
    assert torch.equal(share_values(v, 2, 2)[..., :2], share_values(v, 2, 2)[..., 2:4])
    torch.testing.assert_close(got, each.unflatten(-1, (2, 2, 2)).sum(3).flatten(2))


def test_no_gradient_asked_no_surrogate():
    q, k, v, e0, e1 = example(16)
    y = rosa(q, k, v, e0, e1, bits=2, estimator="suffix_attention")
    assert torch.equal(y, rosa(q, k, v, e0, e1, bits=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype):
    inputs = [x.to(dtype) for x in example(40, 2, 4)]
    results = []
    for cast in (dtype, torch.float64):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        y = rosa(*leaves, bits=4, estimator="suffix_attention")
        assert y.dtype == cast
        results.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for name, low, high in zip(("dq", "dk", "dv", "de0", "de1"), *results, strict=True):
        assert (low.double() - high).norm() / high.norm() < 2e-2, name


def test_fullgraph_compile():
    q, k, v, e0, e1 = (x.float().requires_grad_() for x in example(12))

    def call(*x):
        return rosa(*x, bits=2, estimator="suffix_attention", dropout=0.2, seed=torch.tensor([4]))

    expected = torch.autograd.grad(call(q, k, v, e0, e1).square().sum(), (q, k, v))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v, e0, e1).square().sum(), (q, k, v))
    torch.testing.assert_close(got, expected)


def test_bad_options_are_refused():
    q, k, v, e0, e1 = example()
    for options, message in (
        ({"scale": 0.0}, "must be positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"granularity": "run"}, "compares symbols, not runs"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            rosa(q, k, v, e0, e1, bits=2, estimator="suffix_attention", **options)
