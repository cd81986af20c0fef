"""The comparison of estimators: its data, its equal terms, and every part at a tiny size."""

from __future__ import annotations

import json
import time

import pytest
import torch
from benchmarks.estimators import cost, fused, page, plan, pool, results, work
from benchmarks.estimators.__main__ import main
from benchmarks.estimators.parts import PARTS
from benchmarks.estimators.recall import Training, build, questions, run
from benchmarks.estimators.recall_data import IGNORED, Task
from benchmarks.estimators.tables import table
from benchmarks.estimators.trunk import Block, Trunk
from benchmarks.estimators.variants import VARIANTS
from torch.nn import functional as F

from benchmarks import claims
from rosakit.ops.estimators import names

TINY = Trunk(width=16, layers=1, heads=2, bits=4, routes=4)


def sample(task, batch=16, seed=0):
    return task.sample(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["mqar", "synonyms"])
def test_every_question_has_its_one_answer_in_the_context(kind):
    task = Task(kind, pairs=8, length=64, vocabulary=128)
    tokens, targets = sample(task)
    forms = task.forms if kind == "synonyms" else 1
    for row, wanted in zip(tokens, targets, strict=True):
        keys, values = row[:16:2] // forms, row[1:16:2]
        assert len(set(keys.tolist())) == len(set(values.tolist())) == 8
        assert int(keys.max()) < 64 // forms
        assert int(values.min()) >= 64
        places = (wanted != IGNORED).nonzero()[:, 0]
        assert len(places) == 8
        assert ((places >= 16) & (places % 2 == 0)).all()
        asked = row[places] // forms
        assert sorted(asked.tolist()) == sorted(keys.tolist())
        for key, answer in zip(asked, wanted[places], strict=True):
            assert int(values[keys == key]) == int(answer)


def test_gaps_follow_a_power_law():
    task = Task(pairs=4, length=128, vocabulary=64)
    _, targets = sample(task, 2000)
    places = (targets != IGNORED).nonzero()[:, 1]
    gaps = (places - 8) // 2 + 1
    share = [float((gaps == g).float().mean()) for g in (1, 2, 8)]
    # p(gap) ~ 1 / gap: drawn without replacement, the first is met in most sequences.
    assert share[0] > share[1] > share[2] > 0
    assert 0.15 < share[0] < 0.25


def test_the_same_seed_gives_the_same_sequences_and_bad_sizes_are_refused():
    task = Task(pairs=4, length=32, vocabulary=64)
    assert all(torch.equal(a, b) for a, b in zip(sample(task), sample(task), strict=True))
    assert not torch.equal(sample(task)[0], sample(task, seed=1)[0])
    with pytest.raises(ValueError, match="even length of at least 32"):
        Task(pairs=8, length=30)
    with pytest.raises(ValueError, match="too few"):
        Task(pairs=8, length=32, vocabulary=16)


@pytest.mark.parametrize("length", [1, 15, 16, 33])
def test_windowed_attention_is_masked_attention(length):
    torch.manual_seed(0)
    block = Block(TINY)
    torch.nn.init.normal_(block.out.weight)
    torch.nn.init.normal_(block.near)
    u = torch.randn(2, length, 16)
    q, k, v = block.qkv(u).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    place = torch.arange(length)
    mask = block._bias(place[:, None] - place, 16)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block._attend(u), block.out(wanted))


def test_every_estimator_is_compared_and_starts_from_the_same_numbers():
    assert set(names()) <= {v.estimator for v in VARIANTS.values()}
    task = Task(pairs=2, length=16, vocabulary=32)
    states = [build(v, 3, task, TINY).state_dict() for v in VARIANTS.values()]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[n], states[0][n]) for n in state)
    other = build(VARIANTS["control"], 4, task, TINY).state_dict()
    assert not torch.equal(other["embed.weight"], states[0]["embed.weight"])


def test_retrieval_learns_what_its_control_cannot():
    """Keys asked beyond the window: only what is retrieved can answer them."""
    task = Task(pairs=4, length=64, vocabulary=24)
    training = Training(steps=150, batch=32, rate=1e-2, held_out=64)
    trunk = Trunk(width=32, layers=1, heads=2, window=4, bits=5, routes=12)
    found = {
        name: run(name, 0, task=task, trunk=trunk, training=training, device="cpu")["accuracy"]
        for name in ("counterfactual", "control")
    }
    assert found["counterfactual"] > 0.6
    assert found["control"] < 0.3


@pytest.mark.parametrize("part", PARTS)
def test_parts_run_and_are_stored(part, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rosakit.models.rwkv8.training.HELD_OUT", 4)
    out = tmp_path / "estimators.json"
    seeds = "1" if part == "count" else "2"
    common = ["--out", str(out), "--small", "--device", "cpu", "--seeds", seeds]
    assert main([part, *common]) == 0
    content = json.loads(out.read_text())["parts"][part]
    assert {row["variant"] for row in content["rows"]} >= set(names())
    (measured,) = content["runs"]
    assert "torch" in measured["environment"]["versions"]
    assert measured["settings"]["device"] == "cpu"
    shown = capsys.readouterr().out
    assert table(part, content["rows"]) in shown
    # The rows of a part replace those of the same name; other parts stay.
    other = next(name for name in PARTS if name != part)
    second = tmp_path / "other.json"
    assert main([other, "--out", str(second), *common[2:], "--variants", "counterfactual"]) == 0
    assert main(["merge", "--out", str(out), "--files", str(second)]) == 0
    assert json.loads(out.read_text())["parts"].keys() == {part, other}
    capsys.readouterr()
    assert main(["table", "--out", str(out)]) == 0
    assert table(part, content["rows"]) in capsys.readouterr().out
    assert main(["plot", "--out", str(out)]) == 0
    assert list(tmp_path.glob("estimators*.png"))


def test_a_failing_run_leaves_the_others(tmp_path):
    jobs = [(_divide, {"by": 0}), (_divide, {"by": 2})]
    rows = list(pool.results(jobs, 1))
    assert "division" in rows[0]["error"]
    assert rows[1] == {"result": 0.5}
    assert sorted(map(str, pool.results(jobs, 2)))[0] == str(
        {"by": 0, "error": "division by zero after 0 s"}
    )


def _divide(by):
    return {"result": 1 / by}


def test_a_new_row_replaces_the_one_of_its_name_only(tmp_path):
    """And a row keeps the run that it was measured in; runs without rows go."""
    path = tmp_path / "estimators.json"
    old = [{"variant": "control", "seed": s, "accuracy": 0.1 * s} for s in range(3)]
    results.add(path, "mqar", "old", {}, old)
    new = [{"variant": "control", "seed": 1, "accuracy": 0.9}]
    results.add(path, "mqar", "new", {}, new)
    failed = [{"variant": "control", "seed": 0, "error": "out of memory"}]
    results.add(path, "mqar", "newer", {}, failed)
    part = results.read(path)["parts"]["mqar"]
    assert [row["accuracy"] for row in part["rows"]] == [0.0, 0.9, 0.2]
    assert [part["runs"][row["run"]]["command"] for row in part["rows"]] == ["old", "new", "old"]
    assert len(part["runs"]) == 2
    results.add(path, "mqar", "all", {}, old)
    assert len(results.read(path)["parts"]["mqar"]["runs"]) == 1


def test_a_plan_starts_with_every_row_of_the_tasks():
    queue = plan.plan("cuda")
    names = [planned.name for planned in queue]
    assert len(set(names)) == len(names)
    first = queue[: 3 * (8 + 12 + 11)]
    assert {one.part for one in first} == {"mqar", "synonyms", "count"}
    by_group = {}
    for planned in queue:
        by_group.setdefault(planned.group, set()).add(planned.job[1]["seed"])
    assert all(seeds == {0, 1, 2} for seeds in by_group.values())
    largest = {r.job[1]["variant"] for r in queue if r.job[1].get("task") == plan.LARGEST}
    assert largest == set(VARIANTS)


@pytest.mark.parametrize("processes", [1, 2])
def test_work_fills_its_time_and_goes_on_where_it_stopped(processes, tmp_path, monkeypatch):
    monkeypatch.setattr("rosakit.models.rwkv8.training.HELD_OUT", 4)
    folder, out = tmp_path / "runs", tmp_path / "estimators.json"
    folder.mkdir()
    whole = plan.plan("cpu", small=True, seeds=1)
    keep = [one for one in whole if one.part == "synonyms"][:3]
    for one in whole:
        if one not in keep:  # as if a call before had done them
            (folder / f"{one.name}.json").write_text(
                json.dumps({"part": "fit", "took": 0, "settings": {}, "row": _fitted(one)})
            )
    (folder / f"{keep[0].name}.claim").touch()  # left by a process that was killed
    command = ["work", "--work", str(folder), "--out", str(out), "--small", "--device", "cpu"]
    command += ["--seeds", "1", "--processes", str(processes), "--seconds", "60"]
    assert main(command) == 0
    for one in keep:
        assert (folder / f"{one.name}.json").exists()
    parts = json.loads(out.read_text())["parts"]
    assert len(parts["synonyms"]["rows"]) == 3
    assert all(0 <= row["accuracy"] <= 1 for row in parts["synonyms"]["rows"])


def _fitted(one):
    return {"variant": one.job[1]["variant"], "seed": 0, "rate": 0.1, "accuracy": 0.5}


def test_a_training_out_of_time_is_given_back(tmp_path):
    one = plan.plan("cpu", small=True, seeds=1)[0]
    work.worker(0, tmp_path, time.monotonic() + 1e-3, "cpu", 1, True)
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.glob("*.claim"))
    assert claims.claim(tmp_path, one.name)
    assert not claims.claim(tmp_path, one.name)


def test_questions_are_where_targets_are():
    task = Task(pairs=5, length=40, vocabulary=64)
    _, targets = sample(task)
    places = questions(targets, 5)
    asked = targets != IGNORED
    assert torch.equal(targets.gather(1, places).flatten(), targets[asked])
    assert (places.diff() > 0).all()


@pytest.mark.parametrize("name", cost.ROWS)
def test_what_is_timed_is_compared_with_its_definition_first(name, monkeypatch):
    monkeypatch.setattr(cost, "inputs", lambda length, *rest: _inputs(min(length, 24), *rest))
    assert cost.error(name, "cpu") < 1e-5


_inputs = cost.inputs


def test_the_table_of_costs_says_where_routes_are_fewer():
    row = {"estimator": "bitflip", "routes": 512, "milliseconds": 1.5, "peak_bytes": 2**20}
    rows = [
        {**row, "length": 512},
        {**row, "length": 1024, "routes": 64},
        {**row, "length": 512, "estimator": "full attention", "routes": None},
    ]
    shown = cost.table({"rows": rows})
    assert "| `bitflip` | 1.50 ms, 1 MiB | 1.50 ms, 1 MiB (64 routes) |" in shown
    assert "| full attention | 1.50 ms, 1 MiB | – |" in shown


def test_growth_compares_four_times_the_length():
    row = {"engine": "cuda", "estimator": "soft_dp"}
    rows = [
        {**row, "length": 4096, "milliseconds": 10.0, "peak_bytes": 100},
        {**row, "length": 16384, "milliseconds": 150.0, "peak_bytes": 400},
        {**row, "engine": "triton", "length": 4096, "milliseconds": 10.0, "peak_bytes": 100},
    ]
    assert fused.growth(rows) == [{**row, "milliseconds_factor": 15.0, "peak_bytes_factor": 4.0}]


def test_tables_go_where_the_page_has_a_place(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("a\n<!-- table: fit -->\nold\n<!-- end: fit -->\nb\n")
    page.write(path, {"fit": "| new |"})
    assert path.read_text() == "a\n<!-- table: fit -->\n| new |\n<!-- end: fit -->\nb\n"
    with pytest.raises(ValueError, match="no place for 'count'"):
        page.write(path, {"count": ""})


def test_the_page_shows_what_the_results_say():
    text = page.COMPARISON.read_text(encoding="utf-8")
    docs = page.DOCS.parent / "results"
    for name, body in page.tables(docs / "estimators.json").items():
        assert f"<!-- table: {name} -->\n{body}\n<!-- end: {name} -->" in text
    costs = docs / "estimators_cost.json"
    if costs.exists():
        assert cost.table(json.loads(costs.read_text())) in text
