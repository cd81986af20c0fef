"""The ablation of addresses: halves equal the whole, every variant trains, the table is right."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import pytest
import torch
from benchmarks.addresses.coverage import measure
from benchmarks.addresses.halves import Given, compute_hidden, open_hidden, upper_half
from benchmarks.addresses.misread import elsewhere, misread
from benchmarks.addresses.rule import Rule, write_rule
from benchmarks.addresses.table import collect, mean_tables, plot, render
from benchmarks.addresses.train import Plan, Text, train_variant
from benchmarks.addresses.variants import VARIANTS

from rosakit.tuning import RosaConfig, adapters_of, attach, record_matches
from rosakit.types import Match
from tests.tuning.tiny import build, tokens

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


@pytest.mark.parametrize("what", ["own", "random"])
def test_misreads_keep_the_pattern_and_change_the_place(what):
    position = torch.tensor([[[-1, 0, -1, 1, 2, 0], [-1, -1, -1, 1, 2, -1]]], dtype=torch.int32)
    for _ in range(20):
        got = elsewhere(position, what)
        assert got.dtype == position.dtype
        assert torch.equal(got < 0, position < 0)
        own = torch.arange(6).expand_as(got)
        there = got >= 0
        assert (got[there] == own[there]).all() if what == "own" else (got < own)[there].all()
        assert torch.equal(got[:, 0][there[:, 1]], got[:, 1][there[:, 1]])  # alike for all routes


def test_a_control_reads_its_own_values_where_the_choice_finds_something():
    model = build()
    options = {"address": "token", "address_candidates": 2, "select": 4, "layers": (1,)}
    attach(model, RosaConfig(**options))
    (adapter,) = adapters_of(model).values()
    ids = tokens(1, 60, kinds=4)
    with record_matches(model) as contexts:
        model(ids, use_cache=False)
    found = contexts[-1].matches[1].position
    misread(adapter, "own")
    v = torch.randn(1, 60, adapter.channels)
    y = adapter.read_at(v, found, adapter.e0, adapter.e1)
    own = torch.where(v > 0, adapter.e1, adapter.e0)
    there = (found >= 0).transpose(1, 2).repeat_interleave(adapter.bits, -1)
    torch.testing.assert_close(y, torch.where(there, own, 0.0))
    assert there.any()
    assert not there.all()


def test_a_written_rule_corrects_the_lengths_it_names():
    model = build()
    tiers = {"length_tiers": (1, 2), "far_distance": 300, "far_candidates": 1}
    attach(model, RosaConfig(address="token", select=4, layers=(1,), **tiers))
    (adapter,) = adapters_of(model).values()
    write_rule(adapter, Rule(near=-1.0, far=0.25, single=-0.5, long=2.0))
    length = torch.tensor([1, 2, 5, 6, 1, 1, 1])
    distance = torch.tensor([255, 1, 4, 4, 256, 2047, 2048])
    found = Match(torch.zeros(1, 2, 7, dtype=torch.int32), length.expand(1, 2, 7))
    u, keys = torch.randn(1, 7, 32), torch.randn(1, 2, 7, 8)
    with torch.no_grad():
        lengths = adapter.selection(u, keys, found, distance.expand(1, 2, 7))[0, :, 0]
    expected = [-1.5, 0.0, math.log2(5) - 1.0, math.log2(6) + 1.0, -0.25, -0.25, -0.5]
    torch.testing.assert_close(lengths, torch.tensor(expected))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_reports(tmp_path, name):
    model = build()
    parts = texts(model, tmp_path, None if name == "ceiling" else 9)
    upper = upper_half(model, CUT).requires_grad_(False)
    given = Given.of(upper)
    read = [Text(ids, partial(given.take, hidden, torch.device("cpu"))) for ids, hidden in parts]
    plan = Plan(tokens=180, batch=1, lr=1e-2, layers=(0, 1), window=9, sinks=3, backend="auto")
    before = copy.deepcopy(upper.state_dict())
    train_variant(upper, *read, name, 0, plan, tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["steps"] == 2
    assert found["heldout"].keys() == {"0-90"}
    assert 0 < found["heldout"]["0-90"] < 9
    retrieves = name not in ("control", "ceiling")
    assert set(found["after"]) == ({"0", "1"} if retrieves else set())
    assert set(found["learned"]) == ({"0", "1"} if "select" in VARIANTS[name].rosa else set())
    after = upper.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def run(variant, seed, early, late, agreement=None):
    found = {} if agreement is None else {"0": {"next_token": agreement}}
    return {
        "variant": variant,
        "seed": seed,
        "what": variant,
        "tokens": 1000,
        "heldout": {"0-256": early, "256-1024": 2.0, "1024-4096": late},
        "before": found,
        "after": found,
    }


def test_the_table_compares_within_seeds(tmp_path):
    runs = [
        *(run("control", 0, 2.0, 1.8), run("ceiling", 0, 2.0, 1.4)),
        *(run("control", 1, 2.1, 1.9), run("ceiling", 1, 2.0, 1.4)),
        *(run("token", 0, 2.1, 1.7, 0.5), run("token", 1, 2.1, 1.9, 0.7)),
    ]
    control, token, ceiling = collect(runs)
    assert [row["variant"] for row in (control, token, ceiling)] == ["control", "token", "ceiling"]
    assert control["late"]["mean"] == control["net"]["mean"] == 0
    assert ceiling["late"]["mean"] == pytest.approx(1)
    assert token["late"]["values"] == pytest.approx([0.25, 0.0])
    assert token["net"]["values"] == pytest.approx([0.5, 0.0])
    assert token["after"]["next_token"] == pytest.approx([0.6])
    text = render([control, token, ceiling])
    assert "| `token`: token | 2 | 2.1000 | 2.0000 | 1.8000 | 12.5 ± 17.7 % |" in text
    plot([control, token, ceiling], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="different length"):
        collect([*runs, run("hash", 0, 2.0, 1.8) | {"tokens": 900}])


def test_learned_tables_are_averaged_over_seeds_and_layers():
    tables = [{"length": [1.0, 2.0]}, {"length": [3.0, 2.0]}, {"length": [5.0, 8.0]}]
    found = [{"0": tables[0], "1": tables[1]}, {"0": tables[2]}]
    assert mean_tables(found) == {"length": [3.0, 4.0]}
    one = run("control", 0, 2.0, 1.8) | {"learned": found[0]}
    (row,) = collect([one])
    assert row["learned"] == {"length": [2.0, 2.0]}


def test_coverage_counts_what_is_right():
    ids = torch.arange(7).repeat(300)[None, :2000]  # period 7: every match is right
    rows = {row["address"]: row for row in measure(ids, 50)}
    assert rows["token match, candidate 1"]["hit"] == 1
    assert rows["token match, candidate 1"]["beyond"] == 0
    assert rows["token match, candidate 2"]["rate"] == 0
    assert rows["token match at least 50 back"]["hit"] == 1
    assert rows["token match at least 50 back"]["beyond"] == 1
    assert rows["8-bit hash of 3 tokens, 2 alike in a row"]["right"] == 1
