"""What training loops do to an operator, for every estimator.

Autocast, loss scaling, recomputation, compilation, and shapes without data.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from rosakit.layers import RosaAdapter, RosaContext
from rosakit.ops import rosa

CASES = {
    "bitflip": {},
    "bitflip, sampled": {"stride": 3},
    "counterfactual": {},
    "soft_dp": {"tau": 0.5},
    "soft_scan": {"tau": 0.5},
    "soft_scan, straight through": {"tau": 0.5, "straight_through": True},
    "suffix_attention": {},
    "suffix_attention, dropout": {"dropout": 0.3},
    "suffix_attention, window": {"window": 3, "fused": True},
}
FIXED = [name for name in CASES if name not in ("bitflip, sampled", "suffix_attention, dropout")]


def adapter(case, **options):
    torch.manual_seed(0)
    layer = RosaAdapter(
        8, bits=2, estimator=case.partition(",")[0], estimator_options=CASES[case], **options
    )
    with torch.no_grad():
        layer.o_proj.weight.normal_()
    return layer


def gradients(layer, loss):
    layer.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    """Projections in the low type, parameters and their gradients in float32."""
    layer = adapter(case)
    u = torch.randn(2, 20, 8)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(u, RosaContext())
    assert out.dtype == dtype
    out.float().square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32, name
        assert p.grad.isfinite().all(), name
    assert layer.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("case", FIXED)
def test_loss_scaling_is_undone_exactly(case):
    layer = adapter(case)
    u = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    plain = gradients(layer, lambda: layer(u, RosaContext()).square().mean())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    layer.zero_grad()
    scaler.scale(layer(u, RosaContext()).square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=lambda m, n=name: f"{n}: {m}")
    scaler.step(optimizer)
    scaler.update()
    before = layer.q_proj.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(u, RosaContext()).square().mean()).backward()
    layer.q_proj.weight.grad[0, 0] = torch.inf  # an overflow
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.q_proj.weight, before)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(case, reentrant):
    layer = adapter(case)
    u = torch.randn(2, 20, 8, requires_grad=True)

    def loss(wrap):
        torch.manual_seed(5)  # what samples and drops
        return wrap(lambda x: layer(x, RosaContext())).square().mean()

    plain = gradients(layer, lambda: loss(lambda f: f(u)))
    again = gradients(layer, lambda: loss(lambda f: checkpoint(f, u, use_reentrant=reentrant)))
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", FIXED)
def test_one_graph(case):
    """``torch.compile(fullgraph=True)``, forward and backward."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 12, 4, generator=g).requires_grad_() for _ in range(3)]
    e0, e1 = -torch.ones(4), torch.ones(4)

    def call(q, k, v):
        return rosa(q, k, v, e0, e1, bits=2, estimator=case.partition(",")[0], **CASES[case])

    slope = torch.randn(1, 12, 4, generator=g)
    expected = torch.autograd.grad(call(*leaves), leaves, slope)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves, slope), expected)


@pytest.mark.parametrize("case", CASES)
def test_shapes_without_data(case):
    """Forward and backward of every operator have fake kernels."""
    with FakeTensorMode():
        leaves = [torch.empty(2, 12, 4).requires_grad_() for _ in range(3)]
        e0, e1 = torch.empty(2, 4)
        name = case.partition(",")[0]
        y = rosa(*leaves, e0, e1, bits=2, estimator=name, **CASES[case])
        found = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert y.shape == (2, 12, 4)
    assert all(g.shape == (2, 12, 4) for g in found)
