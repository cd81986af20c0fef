"""The sweeps: every arm they name trains and scores, and what has finished can be read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.evidence import __main__ as command
from benchmarks.evidence.arms import arms
from benchmarks.evidence.plan import PLAN, TOKENS
from benchmarks.evidence.sweep_figure import draw_sweeps
from benchmarks.evidence.sweeps import GROUPS, LONG, SWEEP
from benchmarks.evidence.tables import markdown, sweeps
from benchmarks.evidence.train import Learner, Sizes

from tests.tuning import texts

LENGTH, WINDOW = 48, 8
SIZES = Sizes(tokens=2 * LENGTH, block=LENGTH, batch=1, accumulate=1, window=WINDOW)
NAMES = tuple(dict.fromkeys(run.arm for run in (*PLAN, *SWEEP, *LONG)))


@pytest.mark.parametrize("name", NAMES)
def test_every_planned_arm_trains_and_scores(name):
    arm = arms(WINDOW)[name]
    options = {k: v for k, v in arm.options if k != "routes"}  # the model is narrower than that
    if options.get("bits", 0) > 4:
        options["bits"] = 4
    layers = (0, 1) if arm.adapters else ()
    arm = dataclasses.replace(arm, adapters=layers, options=tuple(options.items()))
    model = texts.model()
    rows = np.random.default_rng(0).integers(3, 40, (4, LENGTH), dtype=np.int32)
    learner = Learner(model, arm, WINDOW, seed=0)
    if arm.trains:
        before = [p.detach().clone() for p in learner._trained()]
        done = learner.train({"code": rows}, SIZES, 1e9)
        assert done["tokens"] == done["tokens_planned"] == 2 * LENGTH
        moved = [not torch.equal(a, b) for a, b in zip(before, learner._trained(), strict=True)]
        assert any(moved)
    ids = torch.from_numpy(rows[:1].astype(np.int64))
    assert torch.isfinite(learner.scorer()(ids)["model"].log_prob).all()
    learner.remove()
    assert not any("lora" in n or "rosa" in n for n, _ in model.named_parameters())


def test_a_plan_names_each_run_once_and_its_references_before_the_rest():
    for plan in (PLAN, SWEEP, LONG):
        assert len({run.name for run in plan}) == len(plan)
    assert {(r.arm, r.window, r.tokens) for r in (*SWEEP, *LONG)} == {
        (arm, group.window, group.tokens) for group in GROUPS for arm in group.arms
    }
    # Every group is read against a control and a ceiling of its own window, budget and rank.
    planned = {(r.arm, r.window, r.tokens, r.seed) for r in (*SWEEP, *LONG)}
    for run in (*SWEEP, *LONG):
        suffix = run.arm[run.arm.index("@") :] if "@" in run.arm else ""
        for reference in ("control", "full+trained"):
            assert (reference + suffix, run.window, run.tokens, run.seed) in planned
    # One seed of everything comes before the second of anything; only longer runs may wait.
    seeds = [run.seed for run in SWEEP if run.tokens == TOKENS]
    assert seeds == sorted(seeds)


def test_whatever_has_finished_is_shown(tmp_path):
    def arm(gap: float, recalled: float) -> dict:
        def of(x):
            return {"mean": x, "sd": 0.01, "values": [x, x]}

        return {
            "what": "", "trained_parameters": 4_900_000, "seeds": [0, 1],
            "perplexity": {"code": {}, "books": {}},
            "gap_closed": {"code": of(gap), "books": of(gap / 2)},
            "recall_beyond_window": {"niah": of(recalled)},
        }  # fmt: skip

    near, far = {"control": arm(0, 0), "rosa": arm(0.88, 0.9)}, {"rosa+hide50": arm(0.85, 1)}
    summary = {
        "windows": {"512": {"arms": near | {"rosa@2M": arm(0.9, 1)}}, "256": {"arms": far}},
        "runs": [{"window": 512, "arm": "rosa", "extra_keys": 163.2}],
        "sizes": {"tokens": TOKENS},
    }
    scaled = {"windows": {"512": {"arms": {"rosa@0.5M": {}}}}, "sizes": {"tokens": TOKENS // 4}}
    shown = [(g.title, *g.finished(scaled)) for g in GROUPS if g.finished(scaled)]
    assert shown == [("2M tokens", "rosa@0.5M")]
    lines = sweeps(summary).splitlines()
    assert "| references | `control` | 4.9 |  | 0% ± 1 | 0% ± 1 | 0% ± 1 |  |  | 2 |" in lines
    assert "|  | `rosa` | 4.9 | 163 | 88% ± 1 | 44% ± 1 | 90% ± 1 |  |  | 2 |" in lines
    assert [line.split("|")[2].strip() for line in lines[4:]] == ["`rosa+hide50`", "`rosa@2M`"]
    png, svg = draw_sweeps(summary, tmp_path / "sweep")
    assert png.stat().st_size > 10_000
    drawn = svg.read_text()
    assert "window 256" in drawn
    assert "candidates of the token route" not in drawn


def test_published_sweeps_are_whole_seeds_beside_their_references():
    place = Path(__file__).parents[2] / "docs/results/evidence/sweep/summary.json"
    summary = json.loads(place.read_text(encoding="utf-8"))
    runs = {(run["arm"], run["window"], run["seed"]) for run in summary["runs"]}
    planned = {}
    for run in (*SWEEP, *LONG):
        budget = "" if run.tokens == TOKENS else f"@{run.tokens / 1e6:g}M"
        planned[run.arm + budget, run.window, run.seed] = run.tokens
    assert runs <= planned.keys()
    # Whoever publishes part of a budget's seed has to say here what is missing, and on the page.
    cut_off = {("adapters-bit1", 512, 0)}
    begun = {(planned[run], run[2]) for run in runs}
    assert {run for run in planned if (planned[run], run[2]) in begun} - runs == cut_off


def test_the_page_shows_the_tables_of_the_results():
    results = Path(__file__).parents[2] / "docs/results"
    page = set((results / "evidence.md").read_text(encoding="utf-8").splitlines())
    for name, tables in (("summary.json", markdown), ("sweep/summary.json", sweeps)):
        summary = json.loads((results / "evidence" / name).read_text(encoding="utf-8"))
        rows = [line for line in tables(summary).splitlines() if line.startswith("|")]
        assert len(rows) > 50
        assert set(rows) <= page


def test_the_first_runs_of_a_plan_are_taken_at_another_budget(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(command, "_load", lambda options: (None, None))
    monkeypatch.setattr(command, "run", lambda planned, *_: done.append(planned))
    sizes = ["--plan", "sweep", "--scale", "0.25", "--first", "3"]
    command.main(["work", "--model", "M", "--work", str(tmp_path), *sizes])
    assert done == [run._replace(tokens=TOKENS // 4) for run in SWEEP[:3]]
