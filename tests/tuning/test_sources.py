"""Where models come from, and what is said when they do not."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rosakit.errors import InvalidInputError, UnsupportedModelError
from rosakit.tuning.sources import load_model, load_tokenizer, pick_device, pick_dtype
from tests.tuning.texts import model, tokenizer


@pytest.fixture
def folder(tmp_path):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_local_folder(folder):
    loaded, words = load_model(folder, dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert words("w1 w2")["input_ids"] == [4, 5]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import transformers

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(InvalidInputError, match=r"connect.*local folder or GGUF file") as caught:
        load_model("owner/name", device="cpu")
    assert "more" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{0}/missing.gguf", "no such GGUF file"),
        ("{0}/missing", "neither a folder nor a hub name"),
        ("{0}", "holds no config.json"),
        ("{0}/model/config.json", "is a file"),
    ],
)
def test_names_that_lead_nowhere(folder, name, said):
    with pytest.raises(InvalidInputError, match=said):
        load_model(name.format(folder.parent), device="cpu")


def test_a_folder_with_a_gguf_file_only_says_how_to_name_it(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidInputError, match=r"give .*x\.gguf"):
        load_model(tmp_path)


def test_a_broken_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF nothing of the kind")
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load_model(tmp_path / "x.gguf", device="cpu")


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a)
    )
    with pytest.raises(ModuleNotFoundError) as caught:
        load_tokenizer(tmp_path / "x.gguf")
    assert caught.value.name == "gguf"


def test_broken_weights(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load_model(folder, device="cpu")


def test_devices_and_dtypes():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(InvalidInputError, match="dtype 'int8' is not known"):
        pick_dtype("int8", torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="device 'gpu'"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInputError, match="sees no GPU"):
            pick_device("cuda")
