"""`rosakit generate` and `rosakit info MODEL`: sessions, talks at the terminal, memory."""

from __future__ import annotations

import io
import json
import sys

import pytest

pytest.importorskip("transformers")

from rosakit.cli import main
from rosakit.tuning import RosaConfig, TuneConfig, attach
from rosakit.tuning.result import save_trained
from tests.tuning.test_conversation import chat_tokenizer
from tests.tuning.texts import model


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The folder of a run (untrained) and its base model."""
    folder = tmp_path_factory.mktemp("result")
    base = model()
    base.save_pretrained(folder / "base")
    chat_tokenizer().save_pretrained(folder / "base")
    config = RosaConfig(window=8, sink_tokens=2, token_route=True, adapters=False)
    run = TuneConfig(model=str(folder / "base"), rosa=config, device="cpu", lora_rank=0)
    save_trained(attach(base, config), folder / "run", run)
    return folder / "run"


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


GREEDY = ("--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")


def test_a_session_goes_on(result, capsys, tmp_path):
    session = tmp_path / "story"
    read = []
    for prompt in ("w5 w6 w7 w5 w6", "w7 w8"):
        options = ("--session", session, "--memory", *GREEDY)
        assert call("generate", result, "--prompt", prompt, *options) == 0
        shown = capsys.readouterr()
        count, said = shown.err.split(" ", 1)
        assert said.startswith("tokens: on the model's device")
        read.append(int(count))
    assert read == [5 + 7, 5 + 8 + 2 + 7]  # a turn's last token is read in the next one
    assert call("generate", result, "--prompt", "w7", "--chat", "--session", session, *GREEDY) == 2
    assert "holds plain text, not chat messages" in capsys.readouterr().err
    session.write_bytes(session.read_bytes()[:-9])
    assert call("generate", result, "--prompt", "w7", "--session", session, *GREEDY) == 2
    assert "save it again" in capsys.readouterr().err


def test_a_talk_at_the_terminal(result, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("w20 w21\n\nw22\n"))
    assert call("generate", result, "--chat", "--no-stream", *GREEDY) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err.count("> ") == 4


def test_flags_reach_generation(result, capsys):
    options = ("--prompt", "w5 w6 w7 w5 w6", *GREEDY)
    assert call("generate", result, *options) == 0
    wanted = capsys.readouterr().out
    for extra in (("--prompt-lookup", "3"), ("--no-stream",), ("--prefill-chunk", "2")):
        assert call("generate", result, *options, *extra) == 0
        assert capsys.readouterr().out == wanted
    assert call("generate", result, *options, "--prefill-chunk", "0") == 2
    assert "prefill_chunk" in capsys.readouterr().err


def test_info_plans_the_memory_of_a_result(result, capsys):
    assert call("info", result, "--context", "100000") == 0
    assert "100000 tokens: on the model's device" in capsys.readouterr().out
    assert call("info", result, "--context", "100000", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] < 0.01 * plan["plain"]
    assert call("info", result / "none") == 2
    assert "no such folder" in capsys.readouterr().err
