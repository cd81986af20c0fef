"""Streamed data: the same kind of blocks, in any amount, without reading all texts first."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rosakit.errors import DataError, InvalidInputError
from rosakit.tuning.data import DataConfig
from rosakit.tuning.settings import TuneConfig
from rosakit.tuning.streamed import StreamedBlocks, held_out
from rosakit.tuning.train import tune
from tests.tuning.test_stages import ROSA
from tests.tuning.texts import model, repeating, tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The same documents as a folder, as JSONL and as parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("texts")
    documents = [d.text for d in repeating(40)]
    (folder / "files").mkdir()
    for index, text in enumerate(documents):
        (folder / f"files/{index:02}.txt").write_text(text)
    rows = [json.dumps({"text": text}) for text in documents]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    parquet.write_table(pa.table({"text": documents}), folder / "rows.parquet")
    return folder


def blocks(source, count=30, **options):
    config = DataConfig(sources=str(source), streaming=True, **options)
    return StreamedBlocks(config, tokenizer(), 64, count=count, seed=3)


def test_sources_of_every_kind_give_the_same_blocks(texts):
    folder, rows, table = (blocks(texts / n) for n in ("files", "rows.jsonl", "rows.parquet"))
    for index in range(30):
        for name, tensor in folder[index].items():
            assert tensor.shape == (64,)
            assert torch.equal(tensor, rows[index][name])
            assert torch.equal(tensor, table[index][name])


def test_any_block_can_be_reached(texts):
    """A resumed run asks for a late block first; several processes for every other one."""
    wanted = [blocks(texts / "files")[i]["input_ids"] for i in range(0, 30, 7)]
    one = blocks(texts / "files")
    again = [one[i]["input_ids"] for i in range(0, 30, 7)]
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    assert torch.equal(one[7]["input_ids"], wanted[1])  # backwards
    with pytest.raises(IndexError):
        one[30]


def test_the_stream_begins_again_in_another_order(texts):
    many = blocks(texts / "files", count=400)
    seen = [tuple(many[i]["input_ids"].tolist()) for i in range(400)]
    once = len(set(seen))
    assert 80 < once < 400
    assert seen[:50] != seen[once : once + 50]


def test_held_out_texts_are_not_trained_on(texts):
    config = DataConfig(sources=str(texts / "files"), streaming=True, heldout_share=0.3)
    left_out = held_out(config, 10**6)
    assert 3 < len(left_out) < 25
    words = {tuple(tokenizer()(d.text)["input_ids"][:20]) for d in left_out}
    many = blocks(texts / "files", count=100, heldout_share=0.3)
    starts = {tuple(many[i]["input_ids"][:20].tolist()) for i in range(100)}
    assert starts
    assert not starts & words
    assert held_out(config, 1) == left_out[:1]
    apart = DataConfig(
        sources=str(texts / "files"), heldout=str(texts / "rows.jsonl"), streaming=True
    )
    assert len(held_out(apart, 1)) == 40


def test_what_cannot_be_streamed_is_refused(tmp_path, texts):
    with pytest.raises(InvalidInputError, match="tokens or steps"):
        TuneConfig(data={"sources": "x", "streaming": True})
    with pytest.raises(DataError, match="no such file"):
        blocks(tmp_path / "nothing")[0]
    (tmp_path / "short.txt").write_text("w1 w2")
    with pytest.raises(DataError, match="fewer tokens than one block of 64"):
        blocks(tmp_path / "short.txt")[0]


def run(texts, output, **options):
    config = TuneConfig(
        data={"sources": str(texts / "rows.jsonl"), "streaming": True, "heldout_share": 0.2},
        output=output,
        **{
            "length": 64,
            "tokens": 64 * 8,
            "rosa": ROSA,
            "log_every": 2,
            "save_every": 4,
            "eval_blocks": 2,
            "device": "cpu",
            **options,
        },
    )
    return tune(config, model=model(), tokenizer=tokenizer(), show=False)


def test_a_streamed_run_has_a_token_budget_and_resumes_exactly(texts, tmp_path):
    whole = run(texts, tmp_path / "whole")
    assert whole.steps == 8
    assert whole.metrics["documents"]["train"] == "streamed"
    assert whole.metrics["heldout_loss"] is not None
    shutil.copytree(whole.output, tmp_path / "half")
    shutil.rmtree(tmp_path / "half/checkpoints/checkpoint-8")
    again = run(texts, tmp_path / "half", resume=True)
    assert again.losses == whole.losses
    assert again.metrics["heldout_loss"] == whole.metrics["heldout_loss"]


def test_patience_stops_a_run_that_learns_nothing(texts, tmp_path):
    options = {"lr": 0.0, "lr_token_route": 0.0, "tokens": None, "steps": 40}
    result = run(texts, tmp_path / "run", eval_every=2, patience=2, **options)
    assert result.steps < 12
    assert not result.interrupted


def test_patience_goes_on_from_a_checkpoint(texts, tmp_path, monkeypatch):
    """The best loss is kept; no folder is missed, and no step is measured twice."""
    warned = []
    monkeypatch.setattr(
        "transformers.trainer.logger.warning", lambda message, *_, **__: warned.append(message)
    )
    options = {"eval_every": 4, "patience": 2}
    whole = run(texts, tmp_path / "run", **options)
    root = whole.output / "checkpoints"
    states = {
        step: json.loads((root / f"checkpoint-{step}/trainer_state.json").read_text())
        for step in (4, 8)
    }
    assert states[4]["best_global_step"] == 4
    assert states[4]["best_metric"] is not None
    assert all(state["best_model_checkpoint"] is None for state in states.values())
    shutil.rmtree(root / "checkpoint-8")
    again = run(texts, tmp_path / "run", resume=True, **options)
    assert not [message for message in warned if "best checkpoint" in message]
    for result in (whole, again):
        measured = [e["step"] for e in result.metrics["history"] if "eval_loss" in e]
        assert measured == [4, 8]
    assert again.metrics["heldout_loss"] == whole.metrics["heldout_loss"]


def test_measuring_without_held_out_text_is_refused(texts, tmp_path):
    """Few documents may leave none out; patience would wait for a loss that never comes."""
    rows = texts / "rows.jsonl"
    out = held_out(DataConfig(sources=str(rows), streaming=True, heldout_share=0.2), 10**6)
    known = {d.text for d in out}
    kept = [r for r in rows.read_text().splitlines() if json.loads(r)["text"] not in known]
    (tmp_path / "few").mkdir()
    (tmp_path / "few/rows.jsonl").write_text("\n".join(kept[:3]))
    for options in ({}, {"patience": 2}):
        with pytest.raises(InvalidInputError, match="none was left out of this data; name some"):
            run(tmp_path / "few", tmp_path / "run", eval_every=2, **options)
    assert not (tmp_path / "run").exists()


def test_loss_and_health_reach_a_reporter(texts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(texts, tmp_path / "run", report_to=("tensorboard",))
    file = next(result.output.rglob("events.out*"))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert {"train/loss", "train/match_rate", "train/hit_rate"} <= set(events.Tags()["scalars"])


def test_reporters_that_are_not_there_are_refused(texts, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    for name in ("wandb", "carrier pigeon"):
        with pytest.raises(InvalidInputError, match=f"cannot report to {name}: .*Install its"):
            run(texts, tmp_path / "run", report_to=(name,))
    assert not (tmp_path / "run").exists()
