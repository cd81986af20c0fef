"""Streaming states give the numbers of a whole sequence, at every width of symbols."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.layers import RosaAdapter, RosaContext, RosaStates, device_state
from rosakit.layers import state as state_module

pytestmark = pytest.mark.skipif(not native.available(), reason="compiled core missing")


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
def test_chunks_equal_the_whole(bits, unmatched):
    torch.manual_seed(bits)
    adapter = RosaAdapter(24, bits=bits, routes=3, unmatched=unmatched)
    torch.nn.init.normal_(adapter.o_proj.weight)
    if adapter.e_null is not None:
        torch.nn.init.normal_(adapter.e_null)
    u = torch.randn(3, 24)[torch.randint(0, 3, (2, 20))]
    states = RosaStates()
    with torch.no_grad():
        whole = adapter(u, RosaContext())
        parts = [adapter(part, RosaContext(states=states)) for part in u.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# --- states in GPU memory -----------------------------------------------------------------------


def streamed(adapter, u, sizes, mask=None):
    states, parts, at = RosaStates(), [], 0
    for n in sizes:
        context = RosaContext(states=states, mask=None if mask is None else mask[:, at : at + n])
        parts.append(adapter(u[:, at : at + n], context))
        at += n
    return torch.cat(parts, 1), states


@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("value_groups", [1, 3])
def test_states_on_the_device_give_the_same_numbers(device, unmatched, padded, value_groups):
    """ "auto" moves to the host on the way, "cuda" stays, "cpu" never was there."""
    torch.manual_seed(1)
    options = {"unmatched": unmatched, "value_groups": value_groups}
    adapter = RosaAdapter(24, bits=4, routes=3, **options).to(device)
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(3, 24)[torch.randint(0, 3, (2, 30))].to(device)
    mask = None
    if padded:
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[0, :5] = False
        mask[1, 3] = False
    results = {}
    with torch.no_grad():
        for backend in ("cpu", "cuda", "auto"):
            adapter.backend = backend
            results[backend], states = streamed(adapter, u, (10, 1, 1, 13, 1, 4), mask)
            on_device = isinstance(states.adapters[0], device_state.DeviceState)
            assert on_device == (backend == "cuda")
            assert states.nbytes > 0
    keep = slice(None) if mask is None else mask
    for backend in ("cuda", "auto"):
        torch.testing.assert_close(results[backend][keep], results["cpu"][keep])


def test_reordering_and_truncation_on_the_device(device):
    torch.manual_seed(2)
    adapter = RosaAdapter(24, bits=4, routes=3).to(device)
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(3, 24)[torch.randint(0, 3, (2, 20))].to(device)
    with torch.no_grad():
        whole = adapter(u, RosaContext())
        adapter.backend = "cuda"
        _, states = streamed(adapter, u, (12, 1))
        states.truncate(torch.tensor([9, 9]))
        states.select(torch.tensor([1, 0]))
        again = adapter(u.flip(0)[:, 9:], RosaContext(states=states))
        torch.testing.assert_close(again, whole.flip(0)[:, 9:])
        states.settle([adapter])
        assert isinstance(states.adapters[0], state_module.AdapterState)
        assert (states.adapters[0].values.lengths == 20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decoding_follows_weights_that_change(dtype):
    """Copies that make a step short are made anew when a weight or a level has changed."""
    torch.manual_seed(0)
    adapter = RosaAdapter(24, bits=2, routes=3, unmatched="null", dtype=dtype)
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(3, 24, dtype=dtype)[torch.randint(0, 3, (2, 30))]
    for change in (None, "e0", "e1", "e_null", "q_proj", "k_proj", "v_proj"):
        if change is not None:
            for parameter in (
                [getattr(adapter, change)]
                if change.startswith("e")
                else getattr(adapter, change).parameters()
            ):
                parameter.mul_(-1.5)
        states = RosaStates()
        parts = [adapter(part, RosaContext(states=states)) for part in u.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), adapter(u, RosaContext()))


def test_levels_learn_through_a_cache():
    """With gradients on, single steps give the gradients of the whole sequence."""
    torch.manual_seed(0)
    adapter = RosaAdapter(24, bits=2, routes=3, unmatched="null")
    torch.nn.init.normal_(adapter.o_proj.weight)
    u = torch.randn(3, 24)[torch.randint(0, 3, (2, 30))]
    names = ("e0", "e1", "e_null")
    levels = [getattr(adapter, name) for name in names]
    wanted = torch.autograd.grad(adapter(u, RosaContext()).square().sum(), levels)
    states = RosaStates()
    parts = [adapter(part, RosaContext(states=states)) for part in u.split(1, dim=1)]
    got = torch.autograd.grad(torch.cat(parts, 1).square().sum(), levels)
    for name, one, other in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(
            one, other, atol=2e-3, rtol=1e-4, msg=lambda m, n=name: f"d{n}: {m}"
        )
