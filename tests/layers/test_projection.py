"""Projections: whole, of low rank, shared."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from rosakit.errors import InvalidInputError
from rosakit.layers import RosaAdapter, RosaContext
from rosakit.layers.projection import Projection, Projections, WeightCopies, copied_numbers


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


# --- weights side by side, for decoding ----------------------------------------------------------


def _apart(projections, x):
    return [m(x) for m in (projections.w_q, projections.w_k, projections.w_v)]


def _in_place_step(projections):
    optimizer = torch.optim.AdamW(projections.parameters(), lr=0.1)
    with torch.enable_grad():
        x = torch.ones(1, 1, 48, dtype=projections.w_q.dtype)
        sum(y.square().sum() for y in _apart(projections, x)).backward()
    optimizer.step()


def _other_weights(projections):
    other = Projections(48, 32, projections.w_q.rank, tied_start=False)
    projections.load_state_dict(other.state_dict())


_CHANGES = {
    "optimizer step": _in_place_step,
    "load_state_dict": _other_weights,
    "to float64 and back, changed": lambda p: (p.double(), _other_weights(p), p.float()),
    "to bfloat16": lambda p: p.bfloat16(),
    "another parameter": lambda p: setattr(
        p.w_k, next(iter(p.w_k._parameters)), copy.deepcopy(next(p.w_q.parameters()))
    ),
}


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("change", _CHANGES)
@torch.no_grad()
def test_copied_weights_follow_the_weights(rank, change):
    torch.manual_seed(0)
    projections, copies = Projections(48, 32, rank, tied_start=False), WeightCopies()
    x = torch.randn(2, 3, 48)
    before, _ = projections.addresses_and_values(x, copies)
    torch.testing.assert_close(before, _apart(projections, x))
    numbers = copied_numbers(48, 32, rank)
    assert copies.nbytes == 4 * numbers == 4 * 3 * (48 * 32 if rank is None else 5 * (48 + 32))
    _CHANGES[change](projections)
    x = x.to(projections.w_q.dtype)
    after, _ = projections.addresses_and_values(x, copies)
    torch.testing.assert_close(after, _apart(projections, x))
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    assert copies.nbytes == numbers * x.element_size()  # the old ones are gone
    assert copy.deepcopy(copies).nbytes == copy.copy(copies).nbytes == 0
    other = Projections(48, 32, rank, dtype=x.dtype)
    other.addresses_and_values(x, copies)
    assert copies.nbytes == 2 * numbers * x.element_size()
    del other  # a detached adapter's copies go with it
    gc.collect()
    assert copies.nbytes == numbers * x.element_size()
    copies.clear()
    assert copies.nbytes == 0


@pytest.mark.parametrize("rank", [None, 5])
@torch.no_grad()
def test_maps_with_more_than_weights_are_called(rank):
    """Hooks, parametrizations and replaced forwards count, on and off; nothing is copied then."""

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.manual_seed(0)
    projections, copies = Projections(48, 32, rank, tied_start=False), WeightCopies()
    x = torch.randn(2, 1, 48)
    plain = _apart(projections, x)
    name = "weight" if rank is None else "up"

    def hook():
        handle = projections.w_q.register_forward_hook(lambda m, args, y: 2 * y)
        return handle.remove

    def parametrize():
        torch.nn.utils.parametrize.register_parametrization(projections.w_q, name, Doubled())
        return lambda: torch.nn.utils.parametrize.remove_parametrizations(
            projections.w_q, name, leave_parametrized=False
        )

    def replace():
        forward = projections.w_q.forward
        projections.w_q.forward = lambda x: 2 * forward(x)
        return lambda: projections.w_q.__dict__.pop("forward")

    for change in (hook, replace, parametrize):
        undo = change()
        (q, k, v), joined = projections.addresses_and_values(x, copies)
        assert joined is None
        assert copies.nbytes == 0
        torch.testing.assert_close([q, k, v], [2 * plain[0], *plain[1:]])
        undo()
        got, _ = projections.addresses_and_values(x, copies)
        torch.testing.assert_close(got, plain)
        assert copies.nbytes > 0
        copies.clear()
