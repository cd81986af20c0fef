"""Projections: whole, of low rank, shared."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.projection import Projection, Projections


def test_low_rank_is_the_product_of_its_factors():
    projection = Projection(48, 32, 5)
    projection.reset()
    x = torch.randn(3, 7, 48)
    assert {n: tuple(p.shape) for n, p in projection.named_parameters()} == {
        "down": (5, 48),
        "up": (32, 5),
    }
    torch.testing.assert_close(projection(x), x @ (projection.up @ projection.down).T)


def test_a_rank_that_saves_nothing_is_a_whole_matrix():
    assert Projection(48, 32, 20).rank is None
    assert Projection(48, 32, 19).rank == 19
    with pytest.raises(InvalidInputError, match="at least 1, got 0"):
        Projection(48, 32, 0)


@pytest.mark.parametrize("rank", [None, 8])
def test_scale_and_zero_start(rank):
    torch.manual_seed(0)
    projection = Projection(512, 512, rank)
    projection.reset()
    x = torch.randn(64, 512)
    assert projection(x).std().item() == pytest.approx(1.0, abs=0.2)
    projection.reset(zero=True)
    y = projection(x)
    assert not y.any()
    y.sum().backward()
    last = projection.weight if rank is None else projection.up
    assert bool(last.grad.any())


def test_tied_start_copies_both_factors():
    projections = Projections(64, 64, 4)
    assert torch.equal(projections.w_q.down, projections.w_k.down)
    assert torch.equal(projections.w_q.up, projections.w_k.up)
    assert projections.w_q.up is not projections.w_k.up
    apart = Projections(64, 64, 4, tied_start=False)
    assert not torch.equal(apart.w_q.down, apart.w_k.down)


def test_shared_projections_belong_to_nobody_who_uses_them():
    shared = Projections(64, 64, 4, own_value=True)
    adapters = torch.nn.ModuleList(
        RosaAdapter(64, projections=shared, own_value=True) for _ in range(2)
    )
    assert {n.rpartition(".")[2] for n, _ in adapters.named_parameters()} == {"e0", "e1"}
    torch.nn.init.normal_(shared.w_o.up)
    u, context = torch.randn(1, 20, 64), RosaContext()
    assert torch.equal(adapters[0](u, context), adapters[1](u, context))
    whole = torch.nn.ModuleDict({"shared": shared, "adapters": adapters})
    twin = copy.deepcopy(whole)
    assert twin["adapters"][1].projections is twin["shared"]
    before = shared.w_q.up.clone()
    adapters[0].reset_parameters()
    assert torch.equal(shared.w_q.up, before)
