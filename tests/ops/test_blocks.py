"""The windowed form block by block against the dense one: outputs, gradients, memory."""

from __future__ import annotations

import pytest
import torch

from rosakit.ops import rosa
from rosakit.ops.estimators import weigh
from rosakit.ops.estimators.blocks import attend_blocks, evidence
from rosakit.ops.estimators.pairwise import Form, attend_naive, windowed

HAMMING = {"gate": "exp", "slope": 0.4, "bias": -1.0, "recurrence": "dp"}
FORM = Form(**HAMMING, score="utility", sharpness=1.2)


def example(length, routes=3, width=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (2, routes, length, width)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 13, 21, 40])
def test_doubling_is_the_sum_of_suffix_products(window):
    a = torch.rand(2, 20, 20, dtype=torch.float64).tril(-1)
    torch.testing.assert_close(evidence(a, window), windowed(a, window))


@pytest.mark.parametrize("length", [1, 2, 17, 63])
@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("budget", [1, 900, 1 << 25])
def test_blocks_are_the_dense_form(length, window, packed, dropout, budget):
    q, k, w, null = (x.requires_grad_() for x in example(length))
    starts = None
    if packed:
        starts = torch.zeros(2, length, dtype=torch.int32)
        starts[:, length // 2 :] = length // 2
        starts[0, -1:] = -1
    form = FORM._replace(window=window, dropout=dropout)
    seed = torch.tensor([3]) if dropout else None
    some = null if window != 3 else None
    got = attend_blocks(q, k, w, some, starts, form, seed, budget=budget)
    expected = attend_naive(q, k, w, some, starts, form, seed)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for name, a, b in zip(
        ("dq", "dk", "dw", "dnull"),
        torch.autograd.grad(got, (q, k, w, null), grad, allow_unused=True),
        torch.autograd.grad(expected, (q, k, w, null), grad, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros_like(q)
        a, b = (zero if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_the_length_score_in_blocks():
    q, k, w, _ = example(30)
    form = Form("sigmoid", 2.0, -1.0, "dp", "length", 1.5, window=4, min_length=2)
    got = attend_blocks(q, k, w, None, None, form, budget=300)
    torch.testing.assert_close(got, attend_naive(q, k, w, None, None, form))


def test_gradcheck():
    q, k, w, null = (x[:1, :1].requires_grad_() for x in example(7))
    form = FORM._replace(window=3)

    def call(q, k, w, null):
        return attend_blocks(q, k, w, null, None, form, budget=30)

    assert torch.autograd.gradcheck(call, (q, k, w, null))


def test_no_block_holds_more_than_its_budget(monkeypatch):
    """Memory is linear in T: what a block gates never exceeds the budget or the window's rows."""
    seen = []
    from rosakit.ops.estimators import blocks

    whole = blocks.gate
    monkeypatch.setattr(
        blocks, "gate", lambda form, x: (seen.append((x.numel(), x.shape[-2])), whole(form, x))[1]
    )
    q, k, w, _ = (x.requires_grad_() for x in example(200, routes=8))
    attend_blocks(q, k, w, None, None, FORM._replace(window=10), budget=8000).sum().backward()
    assert max(cells for cells, _ in seen) <= 2 * 8000
    assert max(rows for _, rows in seen) < 100


def test_estimator_takes_the_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 40, 8, generator=g).requires_grad_() for _ in range(3))
    e0, e1 = -torch.ones(8), torch.ones(8)
    called = []
    whole = weigh.attend_blocks
    monkeypatch.setattr(weigh, "attend_blocks", lambda *x: (called.append(1), whole(*x))[1])
    options = {"bits": 4, "estimator": "suffix_attention"}
    grads = []
    for fused in (True, False):
        y = rosa(q, k, v, e0, e1, window=5, fused=fused, **options)
        grads.append(torch.autograd.grad(y.square().sum(), (q, k, v)))
    assert called
    torch.testing.assert_close(*grads)
    # A window that sees everything is no window.
    for window in (40, 99):
        y = rosa(q, k, v, e0, e1, window=window, fused=False, **options)
        plain = rosa(q, k, v, e0, e1, fused=False, **options)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), q), torch.autograd.grad(plain.sum(), q)
        )
