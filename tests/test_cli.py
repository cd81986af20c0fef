"""The command line: exit codes, messages, and the whole way from tune to generate."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from rosakit.cli import main
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.data import DataConfig
from rosakit.tuning.settings import TuneConfig

pytest.importorskip("transformers")

from tests.tuning.texts import corpus, model, repeating, tokenizer


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny model, texts, and a trained result with its control."""
    folder = tmp_path_factory.mktemp("project")
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for index, document in enumerate(corpus().train):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / f"texts/{index:02}.txt").write_text(document.text)
    (folder / "tune.yaml").write_text(
        "length: 64\nsteps: 4\nsave_every: 0\nlr_token_route: 5e-2\ndevice: cpu\n"
        "data: {heldout_share: 0.2}\nrosa: {window: 16, sink_tokens: 2}\n"
    )
    return folder


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return caught.value.code


@pytest.fixture(scope="module")
def results(project):
    for name, extra in (("run", ()), ("control", ("--control",))):
        code = call(
            *("tune", project / "tune.yaml", "--model", project / "model", "--quiet"),
            *("--data", project / "texts", "--output", project / name, *extra),
        )
        assert code == 0
    return project


def test_tune_takes_file_and_flags(results):
    run = TuneConfig.from_dict(json.loads((results / "run/tune.json").read_text()))
    assert (run.steps, run.length, run.lr_token_route) == (4, 64, 0.05)
    assert run.rosa == RosaConfig(window=16, sink_tokens=2, adapters=False, token_route=True)
    assert run.model == str(results / "model")
    assert run.data == DataConfig(sources=str(results / "texts"), heldout_share=0.2)
    control = TuneConfig.from_dict(json.loads((results / "control/tune.json").read_text()))
    assert control == dataclasses.replace(run, control=True, output=str(results / "control"))


def test_generate_streams_from_prompt_file_and_stdin(results, capsys, monkeypatch):
    text = repeating(1)[0].text
    options = ("--temperature", "0", "--max-new-tokens", "9", "--device", "cpu")
    assert call("generate", results / "run", "--prompt", text, *options) == 0
    written = capsys.readouterr().out
    assert len(written.split()) in range(1, 10)
    (results / "prompt.txt").write_text(text)
    assert call("generate", results / "run", "--file", results / "prompt.txt", *options) == 0
    assert capsys.readouterr().out == written
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert call("generate", results / "run", "--file", "-", *options) == 0
    assert capsys.readouterr().out == written
    assert call("generate", results / "model", "--prompt", "w1 w2", *options) == 0


def test_the_command_that_is_printed_goes_on(project, capsys, monkeypatch, tmp_path):
    """Run exactly as printed, from another folder, after a start with relative names and flags."""
    from rosakit.tuning.trainer import StopCallback

    go_on = StopCallback.on_step_end

    def ask(self, args, state, control, **kwargs):
        self.asked = state.global_step >= 2
        go_on(self, args, state, control, **kwargs)

    monkeypatch.chdir(project)
    with monkeypatch.context() as patch:
        patch.setattr(StopCallback, "on_step_end", ask)
        code = call(
            *("tune", "tune.yaml", "--model", "model", "--data", "./texts", "--quiet"),
            *("--output", "stopped run", "--seed", "3", "--window", "24"),
        )
    assert code == 130
    said = capsys.readouterr().err
    assert "stopped at step 2; go on with: rosakit tune " in said
    command = shlex.split(said.partition("go on with: ")[2])
    monkeypatch.chdir(tmp_path)
    assert call(*command[1:]) == 0
    assert "4 steps" in capsys.readouterr().out
    assert len(json.loads((project / "stopped run/metrics.json").read_text())["losses"]) == 4
    assert list(tmp_path.iterdir()) == []


def test_generate_from_a_saved_adapter(results, capsys, tmp_path):
    import shutil

    adapter = shutil.copytree(results / "run", tmp_path / "adapter")
    (adapter / "tune.json").unlink()
    options = ("--prompt", "w1 w2", "--temperature", "0", "--device", "cpu")
    assert call("generate", results / "run", *options) == 0
    wanted = capsys.readouterr().out
    assert call("generate", adapter, "--base", results / "model", *options) == 0
    assert capsys.readouterr().out == wanted
    assert call("generate", adapter, *options) == 2
    assert "--base" in capsys.readouterr().err


def test_eval_compares_the_variants(results, capsys):
    code = call(
        *("eval", results / "run", "--control", results / "control", "--device", "cpu"),
        *("--length", "64", "--documents", "2", "--niah", "none"),
    )
    assert code == 0
    values = json.loads((results / "run/evaluation.json").read_text())
    assert list(values["variants"]) == ["full", "window", "window+sinks", "control", "rosa"]
    shown = capsys.readouterr().out
    for name, variant in values["variants"].items():
        assert name in shown
        assert f"{variant['ppl']:.2f}" in shown
    for suffix in (".png", ".svg"):
        assert (results / f"run/evaluation{suffix}").stat().st_size > 1000
    assert call("eval", results / "run", "--control", results / "run") == 2
    assert "no control" in capsys.readouterr().err


def test_info(capsys):
    assert call("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["python"].startswith("3.")
    assert set(facts["backends"]) == {"oracle", "cpu", "cuda"}
    assert call("info") == 0
    assert "threads" in capsys.readouterr().out


def test_help_names_every_field(capsys):
    assert call("tune", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for kind in (TuneConfig, DataConfig, RosaConfig):
        for field in dataclasses.fields(kind):
            if field.name not in ("data", "rosa"):
                flag = {"sources": "data"}.get(field.name, field.name).replace("_", "-")
                assert f"--{flag} " in shown, field.name
                assert field.metadata["help"][:20].split("-")[0] in shown
    assert "(default: 512)" in shown


def test_a_model_that_is_none_leaves_no_folder(tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number}: some words " * 50)
    common = ("--data", tmp_path, "--output", tmp_path / "run")
    assert call("tune", "--model", tmp_path / "none", *common) == 2
    assert "neither a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune",), "no model"),
        (("tune", "missing.yaml"), "cannot read configuration missing.yaml"),
        (("tune", "--model", "x"), "no data"),
        (("tune", "--model", "x", "--data", "missing.txt"), "no such file or folder: missing.txt"),
        (("tune", "--steps", "many"), "--steps takes a whole number, got 'many'"),
        (("tune", "--layers", "1,x"), "--layers takes whole numbers"),
        (("tune", "--window", "0"), "window must be at least 1"),
        (("tune", "--bits", "17"), "bits must be at most 16"),
        (("tune", "--estimator-options", "3"), "must be a mapping"),
        (("tune", "--model", "x", "--resume"), "nothing to resume"),
        (("generate", "./missing", "--prompt", "x"), "neither a folder nor a hub name"),
        (("generate", "x", "--prompt", "x", "--file", "y"), "not both"),
        (("eval", "missing"), "no such folder: missing"),
        (("eval", "."), "no result of rosakit tune"),
        (("tune", "--no-such-flag"), "No such option"),
        (("nonsense",), "No such command"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    if err.startswith("error:"):
        assert err.count("\n") == 1


def test_errors_of_data_and_model_files(project, capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    common = ("--model", project / "model", "--device", "cpu", "--output", tmp_path / "run")
    assert call("tune", *common, "--data", empty) == 2
    assert "empty.txt is empty" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    assert call("tune", *common, "--data", short, "--heldout-share", "0") == 2
    assert "fewer than one block" in capsys.readouterr().err
    bad = tmp_path / "bad.yaml"
    bad.write_text("modle: x\n")
    assert call("tune", bad) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    bad.write_text("a: [\n")
    assert call("tune", bad) == 2
    assert "is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rosa: 3", "TuneConfig.rosa must be a mapping"),
        ("lora_alpha: big", "lora_alpha must be a number"),
        ("model: 3", "model must be text"),
        ("output: null", "output must be text"),
        ("data: {max_documents: many}", "max_documents must be an integer"),
        ("data: {sources: [1]}", "sources must be a name"),
        ("rosa: {1: 2}", "no field 1"),
        ("rosa: {estimator: guess}", "unknown estimator"),
        (b"model: \xff\xfe", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--window", "8", "--data", "x")])
def test_yaml_of_the_wrong_type(text, said, flags, capsys, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert call("tune", path, *(() if "sources" in str(text) else flags)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_files_left_out_are_told_in_one_line(project, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    (tmp_path / "b.txt").write_bytes(b"w1 \xff")
    common = ("--model", project / "model", "--device", "cpu", "--output", tmp_path / "run")
    assert call("tune", *common, "--data", tmp_path, "--quiet") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: 1 file was left out")
    assert "b.txt" in first
    assert "fewer than one block" in second


def test_half_a_result_never_generates(results, capsys, tmp_path):
    import shutil

    half = shutil.copytree(results / "run", tmp_path / "half")
    weights = next(half.glob("adapter-*"))
    weights.write_bytes(weights.read_bytes()[:-9])
    assert call("generate", half, "--prompt", "w1") == 2
    captured = capsys.readouterr()
    assert "truncated" in captured.err
    assert captured.out == ""


def raising(error):
    def build():
        def app(**options):
            raise error

        return app

    return build


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModuleNotFoundError("no", name="peft.tuners"), 2, "pip install 'rosakit[tune]'"),
        (ModuleNotFoundError("no", name="gguf"), 2, "pip install 'rosakit[gguf]'"),
        (OSError(errno.ENOSPC, "full", "x.bin"), 2, "no disk space left while writing x.bin"),
        (RuntimeError("odd\nthing"), 1, "RuntimeError: odd thing (unexpected; run again with"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_errors(error, code, said, monkeypatch, capsys):
    monkeypatch.setattr("rosakit.cli.app.build", raising(error))
    assert call("info") == code
    assert said in capsys.readouterr().err
    with pytest.raises(type(error)):
        main(["info", "--debug"])


def test_importing_the_command_line_is_cheap():
    code = (
        "import sys, rosakit.cli.app; rosakit.cli.app.build();"
        "print([m for m in ('transformers', 'peft', 'datasets', 'accelerate', 'matplotlib') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["token-route", "lora-token-route", "adapters"])
def test_example_configurations_are_valid(name):
    from pathlib import Path

    from rosakit.cli.flags import merge
    from rosakit.tuning.settings import load_config

    path = Path(__file__).parents[1] / f"configs/{name}.yaml"
    config = merge(load_config(path), {"model": "m", "data": ["x"], "steps": "none"})
    assert config.output == f"runs/{name}"
    assert config.data.sources == ("x",)


def test_a_length_on_the_command_line_overrides_the_other_in_the_file():
    from rosakit.cli.flags import merge
    from rosakit.errors import InvalidInputError

    for held, given in (("tokens", "steps"), ("steps", "tokens")):
        config = merge({"model": "m", held: 5}, {given: "7"})
        assert (getattr(config, held), getattr(config, given)) == (None, 7)
        assert getattr(merge({"model": "m", held: 5}, {given: "none"}), held) == 5
    with pytest.raises(InvalidInputError, match="not both"):
        merge({"model": "m"}, {"steps": "1", "tokens": "2"})


def test_inspect_writes_a_page_and_figures(results, tmp_path, capsys):
    text = results / "texts" / "00.txt"
    page = tmp_path / "page.html"
    code = call(
        *("inspect", results / "run", "--file", text, "--output", page, "--figures"),
        *("--max-tokens", 40, "--device", "cpu"),
    )
    assert code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "page.png", "page.svg"}
    assert '"kind":"candidate"' in page.read_text()
    assert str(results) not in page.read_text()  # a page says nothing of where it was made
    # A plain model is shown with an untrained token route.
    assert call("inspect", results / "model", "--file", text, "--output", page) == 0
    assert '"token route":"untrained"' in page.read_text()
    assert call("inspect", results / "run", "--file", tmp_path / "none") == 2
    assert "cannot read" in capsys.readouterr().err


def test_eval_runs_suites_and_report_compares(results, tmp_path, capsys):
    output = tmp_path / "e"
    arguments = (
        *("eval", results / "run", "--control", results / "control", "--output", output),
        *("--suites", "perplexity,distance,efficiency", "--niah", "none"),
        *("--length", "60", "--documents", "2", "--limit", "1", "--device", "cpu"),
    )
    assert call(*arguments) == 0
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["settings"]["documents"] == 1
    found = evaluation["variants"]
    assert found["rosa"]["distance"]["held-out text"]["min_length"] == 4
    assert len(list((output / "evaluation.parts").iterdir())) == len(found)
    page = tmp_path / "report.html"
    assert call("report", output, "--output", page, "--png") == 0
    assert {p.suffix for p in tmp_path.glob("report.*")} == {".html", ".png", ".svg"}
    assert call(*arguments[:6], "--suites", "nonsense", "--niah", "none") == 2
    assert "no suite named nonsense" in capsys.readouterr().err
    assert call(*arguments[:6], "--local", "piqa", "--niah", "none") == 2
    assert "--local takes TASK=FILE" in capsys.readouterr().err
