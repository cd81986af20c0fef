"""The comparison of estimators: its data, its equal terms, and every part at a tiny size."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks.estimators import pool
from benchmarks.estimators.__main__ import main
from benchmarks.estimators.parts import PARTS
from benchmarks.estimators.recall import Training, build, run
from benchmarks.estimators.recall_data import IGNORED, Task
from benchmarks.estimators.tables import table
from benchmarks.estimators.trunk import Block, Trunk
from benchmarks.estimators.variants import VARIANTS
from torch.nn import functional as F

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
    assert "torch" in content["environment"]["versions"]
    assert content["settings"]["device"] == "cpu"
    shown = capsys.readouterr().out
    assert table(part, content["rows"]) in shown
    # A part replaces itself and keeps the others.
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
