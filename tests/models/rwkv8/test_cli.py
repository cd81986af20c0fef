"""``rosakit rwkv8``: the commands end to end on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from rosakit.errors import CheckpointError, DataError, InvalidInputError
from rosakit.models import rwkv8
from rosakit.models.rwkv8.cli import rwkv8_app
from rosakit.models.rwkv8.generation import draw, generate
from tests.conftest import GOLDEN
from tests.models.rwkv8.small import random_model


def call(*arguments):
    result = CliRunner().invoke(rwkv8_app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_run_plot(tmp_path):
    folder = tmp_path / "run"
    tiny = ["--task", "reverse", "--digits", 3, "--length", 10, "--channels", 16, "--batch", 4]
    output = call("train", *tiny, "--steps", 5, "--out", folder, "--option", "key_credit=successor")
    assert "estimator counterfactual, 5 steps of 4 x 10 tokens" in " ".join(output.split())
    assert "held-out sequences" in output
    assert "nats a counted token" in output
    config = json.loads((folder / "result.json").read_text())["config"]
    assert config["estimator_options"] == {"key_credit": "successor"}

    output = call("run", folder, "--digits", 3, "--show", "--json", tmp_path / "a.json")
    assert "hybrid model, 2 layers, 16 channels, 1 bit(s) a route" in output
    assert output.count("gold ") == 30
    assert "SUM of running totals (the demo's figure)" in output
    assert "token accuracy (each token once)" in output
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["tokens"][1] == 10 * (2 + 3 + 4)
    assert stored["running_total"][1] == 20 + 50 + 90

    call("plot", folder, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="no result of a training run"):
        call("plot", tmp_path / "nothing")


def test_run_prints_the_published_counts(golden):
    golden("weights_251016_rosa_1bit_run")
    output = call("run", GOLDEN / "weights_251016_rosa_1bit_run.npz")
    for count in golden("e2e_251016_1bitx2")["correct"]:
        assert str(count) in output
    assert "567 of 635 = 89.29%" in output
    assert "SUM" not in output  # the counting demo prints none


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{i} {chr(96 + i)!r} 1\n" for i in range(1, 27)))
    return path


def test_generate(tmp_path, vocabulary):
    rwkv8.save(random_model("lm4"), tmp_path / "lm.safetensors")
    output = call(
        "generate", tmp_path / "lm.safetensors", "--vocab", vocabulary, "--prompt", "abc",
        "--tokens", 5, "--temperature", 0,
    )  # fmt: skip
    assert "next token" in output
    assert "abc" in output.splitlines()[-1]


def test_misuse_is_named(tmp_path, vocabulary):
    rwkv8.save(random_model("lm4"), tmp_path / "lm.safetensors")
    rwkv8.save(random_model("alone"), tmp_path / "count.safetensors")
    with pytest.raises(InvalidInputError, match="rwkv8 generate"):
        call("run", tmp_path / "lm.safetensors")
    with pytest.raises(InvalidInputError, match="task reverse has 12 symbols"):
        call("run", tmp_path / "count.safetensors", "--task", "reverse")
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        call("generate", tmp_path / "lm.safetensors", "--vocab", tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match="tokens up to 26 but the model"):
        call("generate", tmp_path / "count.safetensors", "--vocab", vocabulary)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        call("run", tmp_path / "gone.pth")
    with pytest.raises(InvalidInputError, match="NAME=VALUE"):
        call("train", "--option", "soft", "--steps", 1)


def test_generation_reads_each_token_once():
    """Greedy recurrent generation is the greedy continuation of whole sequences."""
    model = random_model("lm1").double()
    made = list(generate(model, [1, 2, 3, 1, 2], 12, temperature=0, stop=None))
    tokens = [1, 2, 3, 1, 2]
    for token in made:
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    stop = made[3]
    assert (
        list(generate(model, [1, 2, 3, 1, 2], 12, temperature=0, stop=stop))
        == made[: made.index(stop)]
    )
    with pytest.raises(InvalidInputError, match="empty"):
        list(generate(model, [], 3))
    with pytest.raises(InvalidInputError, match="top_p"):
        list(generate(model, [1], 3, top_p=0.0))


def test_draws_stay_in_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits, 1.0, 0.6, generator) for _ in range(200)]
    assert set(drawn) == {0, 1}
    assert 0.5 < drawn.count(0) / 200 < 0.75  # 0.5 of 0.8
    assert {draw(logits, 1.0, 0.4, generator) for _ in range(50)} == {0}
