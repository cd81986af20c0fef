"""The evidence run, small enough for CI: arms trained, measured, put together."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from benchmarks.evidence import __main__ as command
from benchmarks.evidence import collect, corpus, view
from benchmarks.evidence.arms import arms
from benchmarks.evidence.figures import draw
from benchmarks.evidence.measure import Tasks
from benchmarks.evidence.plan import Planned, claimed
from benchmarks.evidence.tables import markdown
from benchmarks.evidence.train import Learner, Sizes

from rosakit.evaluate import EvaluationResult
from rosakit.report import compare_results, load_named
from tests.tuning import texts

LENGTH, WINDOW = 128, 16


def prepared(folder, monkeypatch):
    """Passages that come again far beyond the window, as code and as books."""
    code = texts.repeating(80, words=50, times=6, seed=1)
    books = folder / "books"
    books.mkdir()
    for n, document in enumerate(texts.repeating(30, words=60, times=8, seed=2)):
        (books / f"{n}.txt").write_text(document.text)
    monkeypatch.setattr(corpus, "_code", lambda: iter(code))
    corpus.prepare(
        texts.tokenizer(), folder, books=books, length=LENGTH, block=LENGTH, tokens=9000, heldout=6
    )


def test_texts_are_split_by_file(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    for train, heldout in corpus.load(tmp_path).values():
        assert train.shape[1] == heldout.shape[1] == LENGTH
        known = {row.tobytes() for row in train}
        assert not known & {row.tobytes() for row in heldout}
    names = json.loads((tmp_path / "names.json").read_text())
    assert set(names) == {"code", "books"}


@pytest.mark.timeout(200)
def test_a_small_run_shows_what_the_long_one_shows(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    began = time.monotonic()
    model = texts.model()
    tasks = Tasks(WINDOW, 4, (96,), depths=(0.5,), samples=1, pairs=(3,), documents=4, short=4)
    # Words of the test's vocabulary say nothing about magic numbers.
    monkeypatch.setattr("benchmarks.evidence.measure.make_needles", _needles)
    for name in ("full", "window+sinks", "control", "full+trained", "route", "route-near", "rosa"):
        for seed in (0, 1):
            planned = Planned(name, seed, WINDOW, 30 * 4 * LENGTH)
            command.run(planned, model, texts.tokenizer(), LENGTH, 4, tasks, tmp_path, 1e9)
    summary = collect.collect(tmp_path, tmp_path / "out", model="tiny")
    found = summary["windows"][str(WINDOW)]["arms"]
    assert found["control"]["gap_closed"]["code"]["values"] == [0.0, 0.0]
    assert found["full+trained"]["gap_closed"]["books"]["mean"] == pytest.approx(1.0)
    assert found["route"]["seeds"] == [0, 1]
    assert found["full"]["seeds"] == []
    gain = found["route"]["against_control"]["code"]
    # Passages repeat beyond the window only: that is where the route gains.
    assert gain["late_nats"]["mean"] < -0.2
    assert gain["late_nats"]["mean"] < gain["inside_window_nats"]["mean"] - 0.1
    assert found["rosa"]["against_control"]["code"]["late_nats"]["mean"] < -0.2
    # The same route kept inside the window explains none of it.
    near = found["route-near"]["against_control"]["code"]["late_nats"]["mean"]
    assert near > 0.3 * gain["late_nats"]["mean"]
    saved = sorted((tmp_path / "out").glob("w16-seed*.json"))
    assert len(saved) == 2
    assert set(EvaluationResult.load(saved[0]).variants["rosa"].grids) >= {"mqar"}
    page = compare_results(load_named(saved), tmp_path / "page.html").read_text()
    assert "route-near" in page
    table = markdown(summary)
    assert "| route-near |" in table
    assert "gap closed, late" in table
    assert "**short contexts, window 16**" in table
    assert "mqar, lines" in table
    png, svg = draw(summary, tmp_path / "out")
    assert png.stat().st_size > 10_000
    assert svg.name == "w16.svg"
    assert time.monotonic() - began < 120


def _needles(tokenizer, lengths, depths, **options):
    from rosakit.evaluate.needles import Needle

    ids = torch.randint(3, 50, (lengths[0],), generator=torch.Generator().manual_seed(0))
    return [Needle(ids, 20, 24, 90, 94, lengths[0], depths[0], "w1")]


def test_adapters_train_beside_lora_and_leave_no_trace(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    kinds = {kind: found[0] for kind, found in corpus.load(tmp_path).items()}
    sizes = Sizes(tokens=4 * LENGTH, block=LENGTH, batch=1, accumulate=1, window=WINDOW)
    model = texts.model()
    names = [name for name, _ in model.named_parameters()]
    for name in ("adapters", "adapters-own"):
        arm = dataclasses.replace(arms(WINDOW)[name], adapters=(0, 1, 27))
        learner = Learner(model, arm, WINDOW, seed=0)
        before = {n: p.detach().clone() for n, p in learner.adapters.items()}
        learner.train(kinds, sizes, 1e9)
        moved = {n for n, p in learner.adapters.items() if not torch.equal(p, before[n])}
        assert any("w_o." in n for n in moved)
        assert any("w_q" in n for n in moved) == (name == "adapters")
        learner.remove()
        assert [n for n, _ in model.named_parameters()] == names


def test_an_arm_that_cannot_start_leaves_the_model_plain(tmp_path):
    model = texts.model()
    before = [name for name, _ in model.named_parameters()]
    arm = arms(WINDOW)["adapters"]
    broken = dataclasses.replace(arm, adapters=(0,), options=(("estimator", "none such"),))
    with pytest.raises(Exception, match="none such"):
        Learner(model, broken, WINDOW, seed=0)
    assert [name for name, _ in model.named_parameters()] == before
    Learner(model, arms(WINDOW)["control"], WINDOW, seed=0).remove()


def test_spans_are_hidden_in_a_share_of_the_batches(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    kinds = {kind: found[0] for kind, found in corpus.load(tmp_path).items()}
    sizes = Sizes(tokens=24 * LENGTH, block=LENGTH, batch=1, accumulate=1, window=WINDOW)
    shown: list[bool] = []

    class Recording(Learner):
        def nll(self, ids):
            loss = super().nll(ids)
            shown.append(view._current.seen.view.recall > 0)
            return loss

    for hide, low, high in ((0.0, 24, 24), (0.5, 4, 20), (1.0, 0, 0)):
        shown.clear()
        arm = dataclasses.replace(arms(WINDOW)["rosa"], hide=hide)
        learner = Recording(texts.model(), arm, WINDOW, seed=0)
        learner.train(kinds, sizes, 1e9)
        assert len(shown) == 24
        assert low <= sum(shown) <= high
        # Evaluation shows them whatever the training hid.
        with learner.computing(), torch.no_grad():
            learner.nll(torch.from_numpy(kinds["code"][:1].astype(np.int64)))
        assert shown[-1]


def test_a_finished_run_is_kept_and_the_same_seed_gives_the_same_batches(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    kinds = {kind: found[0] for kind, found in corpus.load(tmp_path).items()}
    sizes = Sizes(tokens=8 * LENGTH, block=LENGTH, batch=2, accumulate=1, window=WINDOW)
    arm = arms(WINDOW)["rosa+repeat"]
    seen = []

    class Recording(Learner):
        def nll(self, ids):
            seen[-1].append(ids)
            return super().nll(ids)

    for _ in range(2):
        seen.append([])
        Recording(texts.model(), arm, WINDOW, seed=5).train(kinds, sizes, 1e9)
    seen = [torch.cat(rows) for rows in seen]
    assert torch.equal(seen[0], seen[1])
    assert seen[0].shape == (8, LENGTH)
    planned = Planned("control", 0, WINDOW, 1000)
    target = tmp_path / "runs" / f"{planned.name}.json"
    target.parent.mkdir()
    target.write_text("kept")
    again = command.run(planned, None, None, LENGTH, 1, Tasks(WINDOW, 4), tmp_path, 1e9)
    assert again.read_text() == "kept"


def test_processes_share_a_plan_and_start_nothing_that_would_be_late(tmp_path, monkeypatch):
    plan = [Planned("a", 0), Planned("b", 0), Planned("c", 0), Planned("d", 0, tokens=10)]
    now = [0.0]
    monkeypatch.setattr("benchmarks.evidence.plan.time.monotonic", lambda: now[0])
    first, second = (claimed(plan, tmp_path, deadline=100.0) for _ in "ab")
    assert next(first).arm == "a"
    assert next(second).arm == "b"
    now[0] = 60.0
    # A run took 60 s for its million tokens: another does not fit, a short one does.
    assert next(first).arm == "d"
    assert next(second, None) is None
    (tmp_path / f"{plan[2].name}.json").write_text("{}")
    assert next(claimed(plan, tmp_path, deadline=100.0), None) is None


def test_nothing_is_trained_but_what_the_arm_adds(tmp_path, monkeypatch):
    prepared(tmp_path, monkeypatch)
    kinds = {kind: found[0] for kind, found in corpus.load(tmp_path).items()}
    sizes = Sizes(tokens=4 * LENGTH, block=LENGTH, batch=1, accumulate=1, window=WINDOW)
    model = texts.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    learner = Learner(model, arms(WINDOW)["rosa"], WINDOW, seed=0)
    learner.train(kinds, sizes, 1e9)
    after = {n.replace(".linear.", "."): p for n, p in model.named_parameters()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert learner.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad) + (
        sum(p.numel() for p in learner.route.parameters())
    )
    ids = torch.from_numpy(kinds["code"][:1].astype(np.int64))
    with learner.computing(), torch.no_grad():
        loss = learner.nll(ids)[0]
    scores = learner.scorer()(ids)["model"]
    assert torch.allclose(-scores.log_prob[0], loss, atol=1e-4)
