"""Every registered estimator behind the same doors: `rosa`, the adapter, schedules."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter
from rosakit.layers.context import RosaContext
from rosakit.ops import rosa
from rosakit.ops.estimators import registry

ESTIMATORS = registry.names()
OPTIONS = {"soft_dp": {"tau": 0.5}, "soft_scan": {"tau": 0.5}}


def example(length=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, 8, generator=g)
    k = torch.where(torch.rand(k.shape, generator=g) < 0.7, q, k)
    return q, k, v, -torch.ones(8), torch.ones(8)


def test_the_published_gradients_are_all_there():
    assert {"bitflip", "counterfactual", "soft_dp", "soft_scan", "suffix_attention"} <= set(
        ESTIMATORS
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_input_gets_a_finite_gradient(name):
    leaves = [x.requires_grad_() for x in example()]
    y, match = rosa(*leaves, bits=4, estimator=name, return_match=True, **OPTIONS.get(name, {}))
    assert y.shape == leaves[0].shape
    assert match.position.shape == (2, 2, 24)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for leaf, grad in zip(leaves, torch.autograd.grad((y * weights).sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_adapter_trains_with_it(name):
    torch.manual_seed(0)
    adapter = RosaAdapter(8, bits=4, estimator=name, estimator_options=OPTIONS.get(name, {}))
    with torch.no_grad():
        adapter.o_proj.weight.normal_()
    u = torch.randn(2, 24, 8)
    adapter(u, RosaContext()).square().sum().backward()
    for label, parameter in adapter.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label


@pytest.mark.parametrize("name", ["bitflip", "counterfactual", "suffix_attention"])
def test_hard_estimators_share_one_forward(name):
    inputs = example()
    leaves = [x.clone().requires_grad_() for x in inputs]
    for options in ({}, {"unmatched": "self"}, {"max_length": 3, "min_length": 2}):
        expected = rosa(*inputs, bits=4, **options)
        assert torch.equal(rosa(*leaves, bits=4, estimator=name, **options), expected)


def test_a_schedule_is_a_function_of_the_step():
    """Temperatures are read at every call, so no estimator holds state."""
    q, k, v, e0, e1 = example()

    def tau(step):
        return 1.0 * 0.01 ** (step / 4)

    distance = [
        (
            rosa(q, k, v, e0, e1, bits=4, estimator="soft_dp", tau=tau(step))
            - rosa(q, k, v, e0, e1, bits=4)
        )
        .abs()
        .mean()
        for step in range(5)
    ]
    assert distance[4] < distance[2] < distance[0]


def test_a_name_is_taken_once():
    with pytest.raises(InvalidInputError, match="registered already"):
        registry.register("bitflip")(lambda *a, **k: None)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_routes_share_value_heads(name):
    """Like a value tensor with repeated heads; a head's gradient is the sum over its routes."""
    q, k, v, e0, e1 = example()
    options = {"bits": 2, "estimator": name, **OPTIONS.get(name, {})}
    heads = v[..., :4].clone().requires_grad_()  # 2 heads of 2 bits for 4 routes
    wide = heads.detach().unflatten(2, (2, 2)).repeat_interleave(2, 2).flatten(2).requires_grad_()
    got = rosa(q.requires_grad_(), k, heads, e0, e1, value_groups=2, **options)
    expected = rosa(q, k, wide, e0, e1, **options)
    assert torch.equal(got, expected)
    slope = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (one,) = torch.autograd.grad(got, heads, slope)
    (each,) = torch.autograd.grad(expected, wide, slope)
    torch.testing.assert_close(one, each.unflatten(2, (2, 2, 2)).sum(3).flatten(2))


@pytest.mark.parametrize(
    ("groups", "said"), [(3, "must divide the number of routes"), (2, "v must have shape")]
)
def test_value_heads_that_do_not_fit(groups, said):
    q, k, v, e0, e1 = example()
    with pytest.raises(InvalidInputError, match=said):
        rosa(q, k, v, e0, e1, bits=2, value_groups=groups)
