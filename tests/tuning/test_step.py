"""Decoding with states on a GPU: whole models give what they give with states on the host."""

from __future__ import annotations

import copy

import pytest
import torch

from rosakit import cuda, native
from rosakit.layers import state as state_module
from rosakit.layers import step as step_module
from rosakit.layers.device_state import DeviceState
from rosakit.tuning import inject
from rosakit.tuning.attach import controller_of
from tests.cuda import emulated
from tests.tuning.tiny import attached, pad_rows, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason="compiled core missing")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda.available(), reason=f"no GPU engine: {cuda.unavailable_reason()}"),
)
OPTIONS = {"bits": 4, "projection_rank": 4, "backend": "cuda"}
NEW = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request, monkeypatch):
    if request.param == "cpu":
        emulated.stream_memory(monkeypatch)
        allowed = {"cuda": None, "cpu": 0}
        monkeypatch.setattr(
            state_module, "positions_on_device", lambda a, batch: allowed[a.backend]
        )
    return request.param


@pytest.fixture
def short(monkeypatch):
    """How many adapters took the short way, and how many did not."""
    counts = {True: 0, False: 0}

    def counted(*args):
        out = step_module.step(*args)
        counts[out is not None] += 1
        return out

    monkeypatch.setattr(inject, "step", counted)
    return counts


def on_host(model):
    """The same model with states on the host."""
    other = copy.deepcopy(model)
    for injected in controller_of(other).injected.values():
        injected.adapter.backend = "cpu"
    return other


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_greedy_and_beams(device, short, family):
    model = attached(family, **OPTIONS).to(device)
    host = on_host(model)
    rows = [tokens(1, n, seed=n)[0] for n in (17, 9)]
    ids, mask = (x.to(device) for x in pad_rows(rows, "left"))
    for beams in (1, 3):
        options = {"attention_mask": mask, "num_beams": beams, **NEW}
        got = model.generate(ids, **options)
        assert torch.equal(got, host.generate(ids, **options))
    # The prompt goes the long way, with states on the host every token.
    layers = len(controller_of(model).injected)
    assert short[True] == 2 * 5 * layers
    assert short[False] == 2 * layers + 2 * 6 * layers


@torch.no_grad()
def test_logits_after_crops_copies_and_chunks(device, short):
    model = attached(window=16, sink_tokens=2, **OPTIONS).to(device)
    ids = tokens(1, 60).to(device)
    whole = on_host(model)(ids, use_cache=False).logits
    out = model(ids[:, :20], use_cache=True)
    cache, parts = out.past_key_values, [out.logits]
    for at, n in ((20, 1), (21, 5), (26, 1), (27, 1)):
        parts.append(model(ids[:, at : at + n], past_key_values=cache).logits)
    other = copy.deepcopy(cache)
    wrong = model(ids[:, :3], past_key_values=cache).logits
    assert wrong.shape[1] == 3
    cache.crop(-3)
    assert isinstance(cache.layers[-1].states.adapters[0], DeviceState)
    for held in (cache, other):  # in turns: a copy has its own state, and its own launches
        last = [model(ids[:, at : at + 1], past_key_values=held).logits for at in range(28, 32)]
        torch.testing.assert_close(torch.cat([*parts, *last], 1), whole[:, :32])
    for at in range(32, 36):
        logits = [
            model(ids[:, at : at + 1], past_key_values=held).logits for held in (cache, other)
        ]
        torch.testing.assert_close(logits[0], logits[1])
        torch.testing.assert_close(logits[0], whole[:, at : at + 1])
    assert short[True] == (4 + 1 + 2 * 4 + 2 * 4) * len(controller_of(model).injected)


@torch.no_grad()
def test_shared_projections_and_gradients(device, short):
    """Shared maps take the short way, too; with gradients on there is none."""
    model = attached(share_projections=True, **OPTIONS).to(device)
    ids = tokens(2, 30).to(device)
    whole = on_host(model)(ids, use_cache=False).logits
    cache = model(ids[:, :20], use_cache=True).past_key_values
    before = dict(short)
    first = model(ids[:, 20:21], past_key_values=cache).logits
    assert short[True] > before[True]
    taken = short[True]
    with torch.enable_grad():
        second = model(ids[:, 21:22], past_key_values=cache).logits
    assert second.requires_grad
    assert short[True] == taken
    third = model(ids[:, 22:23], past_key_values=cache).logits
    got = torch.cat([first, second.detach(), third], 1)
    torch.testing.assert_close(got, whole[:, 20:23])
