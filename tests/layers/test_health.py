"""Each detector on a layer made ill in one way, and silence on a healthy one."""

from __future__ import annotations

import warnings

import pytest
import torch

from rosakit.layers.health import FaultLog, Thresholds, find_faults
from rosakit.ops import rosa


def layer(length=200, routes=10, bits=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, length, routes * bits, generator=g)
    v = torch.randn(q.shape, generator=g)
    return {
        "q": q,
        "k": q.clone(),
        "v": v,
        "e0": -torch.ones(q.shape[2]),
        "e1": torch.ones(q.shape[2]),
    }


def faults_of(parts, **options):
    _, match = rosa(*parts.values(), bits=2, return_match=True, **options)
    parts = {name: x for name, x in parts.items() if name != "v"}
    q, k, e0, e1 = parts.values()
    return {f.name: f for f in find_faults(q, k, match, e0, e1, bits=2)}


def test_a_healthy_layer_is_silent():
    assert faults_of(layer()) == {}


@pytest.mark.parametrize("name", ["q", "k"])
def test_collapsed_codes(name):
    parts = layer()
    parts[name][..., :8] = 1.0  # 4 of 10 routes
    found = faults_of(parts)
    assert found[f"collapsed_{name}"].value == pytest.approx(0.4)
    assert "learning rate" in found[f"collapsed_{name}"].message


def test_one_collapsed_route_of_ten_is_tolerated():
    parts = layer()
    parts["q"][..., :2] = 1.0
    parts["k"][..., :2] = 1.0
    assert faults_of(parts) == {}


def test_dead_routes():
    parts = layer()
    parts["q"][..., :6] = 1.0
    parts["k"][..., :6] = -1.0
    assert faults_of(parts)["dead"].value == pytest.approx(0.3)


def test_drifting_addresses():
    parts = layer()
    parts["k"] = torch.randn_like(parts["k"])
    found = faults_of(parts)
    assert found["drifting"].value == pytest.approx(0.5, abs=0.03)
    assert "tied" in found["drifting"].message


def test_vanishing_levels():
    parts = layer()
    parts["e0"], parts["e1"] = -1e-5 * parts["e1"], 1e-5 * parts["e1"]
    assert faults_of(parts)["vanishing"].value == pytest.approx(2e-5)


def test_padding_is_not_counted():
    parts = layer(length=40)
    starts = torch.zeros(2, 40, dtype=torch.int32)
    starts[:, 20:] = -1
    parts["q"][:, 20:] = parts["k"][:, 20:] = -1.0
    _, match = rosa(*parts.values(), bits=2, return_match=True, segment_starts=starts)
    q, k, _, e0, e1 = parts.values()
    limits = Thresholds(collapsed=0.6)
    options = {"bits": 2, "thresholds": limits}
    assert find_faults(q, k, match, e0, e1, segment_starts=starts, **options) == []
    assert {f.name for f in find_faults(q, k, match, e0, e1, **options)} >= {"collapsed_q"}
    assert find_faults(q, k, match, e0, e1, segment_starts=starts * 0 - 1, **options) == []


def test_fixed_addresses_are_checked_without_codes():
    parts = layer()
    parts["q"][..., :6], parts["k"][..., :6] = 1.0, -1.0
    _, match = rosa(*parts.values(), bits=2, return_match=True)
    found = find_faults(None, None, match, parts["e0"], parts["e0"], bits=2)
    assert [f.name for f in found] == ["vanishing", "dead"]


def test_a_log_warns_once_and_counts():
    parts = layer()
    _, match = rosa(*parts.values(), bits=2, return_match=True)
    q, k, _, e0, e1 = parts.values()
    ill = find_faults(q, k, match, e0, e0, bits=2)
    well = find_faults(q, k, match, e0, e1, bits=2)
    log = FaultLog()
    expected = r"layer 3 \(and layer 5\): mean \|e1 - e0\| is 0"
    with pytest.warns(RuntimeWarning, match=expected) as seen:
        found = log.take({"layer 3": ill, "layer 4": well, "layer 5": ill, "layer 6": well})
    assert len(seen) == 1
    assert "weight decay" in str(seen[0].message)  # the remedy
    assert found == {"faults": 0.5, "fault_vanishing": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert log.take({"layer 3": ill, "layer 4": well}) == found
        assert log.take({"layer 3": well}) == {"faults": 0.0}
        assert log.take({}) == {}
    with pytest.warns(RuntimeWarning, match="layer 4"):
        log.take({"layer 3": ill, "layer 4": ill})
