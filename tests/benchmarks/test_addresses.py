"""The ablation of addresses: halves equal the whole, every variant trains, the table is right."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from benchmarks.addresses.halves import Given, compute_hidden, open_hidden, upper_half
from benchmarks.addresses.train import Plan, Text, train_variant
from benchmarks.addresses.variants import VARIANTS
from tests.tuning.tiny import build, tokens

from rosakit.tuning import RosaConfig, attach

CUT = 1


def texts(model, folder, window):
    found = []
    for part, count in (("train", 3), ("heldout", 2)):
        ids = tokens(count, 90, seed=count).to(torch.int32)
        path = folder / f"{window}-{part}.bin"
        compute_hidden(model, ids, path, cut=CUT, window=window, sinks=3)
        found.append((ids, open_hidden(path, ids, 32, torch.float32)))
    return found


@pytest.mark.parametrize("window", [9, None])
@torch.no_grad()
def test_the_halves_together_are_the_model(tmp_path, window):
    model = build()
    (ids, hidden), _ = texts(model, tmp_path, window)
    upper = upper_half(model, CUT)
    if window is not None:
        for part in (upper, model):
            attach(part, RosaConfig(window=window, sink_tokens=3, adapters=False))
    Given.of(upper).take(hidden, torch.device("cpu"), torch.tensor([2, 0]))
    got = upper(ids[[2, 0]].long(), use_cache=False).logits
    torch.testing.assert_close(got, model(ids[[2, 0]].long(), use_cache=False).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_reports(tmp_path, name):
    model = build()
    parts = texts(model, tmp_path, None if name == "ceiling" else 9)
    upper = upper_half(model, CUT).requires_grad_(False)
    given = Given.of(upper)
    read = [Text(ids, partial(given.take, hidden, torch.device("cpu"))) for ids, hidden in parts]
    plan = Plan(tokens=180, batch=1, lr=1e-2, layers=(0, 1), window=9, sinks=3)
    before = copy.deepcopy(upper.state_dict())
    train_variant(upper, *read, name, 0, plan, tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["steps"] == 2
    assert found["heldout"].keys() == {"0-90"}
    assert 0 < found["heldout"]["0-90"] < 9
    retrieves = name not in ("control", "ceiling")
    assert set(found["after"]) == ({"0", "1"} if retrieves else set())
    after = upper.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
