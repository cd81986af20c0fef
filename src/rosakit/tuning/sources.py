"""Where a pretrained model comes from: a hub name, a local folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rosakit.errors import InvalidInputError, UnsupportedModelError

__all__ = ["load_model", "load_skeleton", "load_tokenizer", "locate", "pick_device", "pick_dtype"]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def pick_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the GPU where there is one.

    Raises:
        InvalidInputError: an unknown device, or a GPU that is not there.
    """
    if device is None or device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Each process of a launcher has its own GPU.
        local = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if local is None else f"cuda:{local}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(
            f"device {device!r} is not known; use cpu, cuda, cuda:0 or auto"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(f"device {device!r} was asked for, but torch sees no GPU; use cpu")
    return found


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named floating-point dtype; "auto" is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InvalidInputError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise InvalidInputError(f"dtype {dtype!r} is not known; use {', '.join(known)} or auto")
    return known[dtype]


def load_model(
    model: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a hub name, a folder written by `save_pretrained`, or the path of a GGUF file.
        gguf_file: name of the GGUF file inside `model`, where that is a folder or a hub name.
        dtype: "float32", "bfloat16", "float16" or "auto".
        device: "cpu", "cuda", "cuda:0", … or "auto".

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode on the device.

    Raises:
        InvalidInputError: a path that does not exist, or an unreachable hub.
        UnsupportedModelError: the folder holds no causal language model that can be loaded.
        ModuleNotFoundError: a GGUF file without the `gguf` extra.
    """
    from transformers import AutoModelForCausalLM

    place = pick_device(device)
    number = pick_dtype(dtype, place)
    source, gguf_file = locate(model, gguf_file)
    options: dict[str, Any] = {"dtype": number}
    if gguf_file is not None:
        from transformers import GgufConfig

        options |= {
            "gguf_file": gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
        }
    with _bars_in_terminals_only():
        loaded = _pretrained(AutoModelForCausalLM, source, options)
        tokenizer = _tokenizer(source, gguf_file)
    return loaded.to(place).eval(), tokenizer


def load_model_config(model: str | os.PathLike[str], gguf_file: str | None = None) -> Any:
    """The configuration of a model, without its weights; arguments and errors as `load_model`."""
    from transformers import AutoConfig

    source, gguf_file = locate(model, gguf_file)
    return _pretrained(AutoConfig, source, {} if gguf_file is None else {"gguf_file": gguf_file})


def load_skeleton(
    model: str | os.PathLike[str], *, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """The model of `load_model` on the meta device: its shapes without its weights.

    Raises:
        InvalidInputError, UnsupportedModelError: as `load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source, gguf_file = locate(model, gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    config = _pretrained(AutoConfig, source, options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_tokenizer(model: str | os.PathLike[str], *, gguf_file: str | None = None) -> Any:
    """The tokenizer of `load_model` alone, with the same arguments and errors."""
    return _tokenizer(*locate(model, gguf_file))


def _tokenizer(source: str, gguf_file: str | None) -> Any:
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    return _pretrained(AutoTokenizer, source, options)


@contextmanager
def _bars_in_terminals_only() -> Iterator[None]:
    """Loading bars redraw themselves, which fills a log file with copies."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def locate(model: str | os.PathLike[str], gguf_file: str | None = None) -> tuple[str, str | None]:
    """What `from_pretrained` takes: a folder or a hub name, and the GGUF file inside it.

    Raises:
        InvalidInputError: nothing of that name can be a model.
        ModuleNotFoundError: it is a GGUF file, and a package that reads those is missing.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and gguf_file is None:
        if not path.is_file():
            raise InvalidInputError(f"no such GGUF file: {name}")
        path, gguf_file = path.parent, path.name
    elif path.is_file():
        raise InvalidInputError(
            f"{name} is a file; a model is a folder written by save_pretrained, a .gguf file, or "
            "a hub name such as HuggingFaceTB/SmolLM2-135M"
        )
    if gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"reading {gguf_file} needs {package}", name="gguf")
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; for its GGUF file give {path / inside[0]}" if inside else ""
            raise InvalidInputError(f"{name} holds no config.json, so it is no model folder{hint}")
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise InvalidInputError(f"no such GGUF file: {path / gguf_file}")
        return str(path), gguf_file
    if not _HUB_NAME.match(name):
        raise InvalidInputError(
            f"no such model: {name} is neither a folder nor a hub name (owner/name), and no .gguf "
            "file"
        )
    return name, gguf_file


def _pretrained(loader: Any, source: str, options: dict[str, Any]) -> Any:
    """`from_pretrained`, with errors that say what to do."""
    from safetensors import SafetensorError

    remote = not Path(source).is_dir()
    try:
        return loader.from_pretrained(source, **options)
    except OSError as error:
        if remote:
            raise InvalidInputError(
                f"cannot get {source!r}: there is no folder of that name, and the model hub did "
                f"not deliver it ({_first_line(error)}). Check the name and the network, or give "
                "a local folder or GGUF file"
            ) from error
        raise UnsupportedModelError(f"cannot load {source}: {_first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(
            f"cannot load {source} as a causal language model: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
