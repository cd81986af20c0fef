"""Sessions: the whole decoding state of an attached model in a file, and back.

Reading a long prompt costs time; its state is small. `save_session` writes the window's keys and
values, the suffix memories and the tokens that were read, and `load_session` continues from there,
in another process, exactly where the first one stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.layers.history import History
from rosakit.layers.state import AdapterState, TokenState
from rosakit.native import SuffixMemory
from rosakit.tuning.attach import adapters_of, controller_of
from rosakit.tuning.cache import RosaCacheLayer, SinkWindowLayer, prepare_cache
from rosakit.tuning.modules import decoder_of
from rosakit.tuning.session_file import Blob, read_blobs, write_blobs

__all__ = ["Session", "load_session", "save_session"]

_SAMPLED = 64
"""Numbers of each parameter that go into the digest of a model."""


class Session(NamedTuple):
    """What a session file holds.

    Attributes:
        cache: `past_key_values` to go on with.
        input_ids: int64 ``[B, T]``, the tokens that the cache has read, or None if not saved.
        notes: what was saved beside them.
    """

    cache: DynamicCache
    input_ids: Tensor | None
    notes: dict[str, Any]


def save_session(
    path: str | os.PathLike[str],
    model: Any,
    cache: Any,
    *,
    input_ids: Tensor | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a decoding state to a file, atomically.

    Args:
        path: the file.
        model: the attached model that filled the cache.
        cache: its `past_key_values`.
        input_ids: the tokens that the cache has read ``[B, T]``, to be kept beside it.
        notes: JSON-like values to be kept beside it.

    Raises:
        InvalidInputError: not a cache of this model, or tokens that do not fit it.
        CheckpointError: it cannot be written; what the file held before is unchanged.
    """
    carrier = _carrier(model, cache)
    carrier.states.settle(adapters_of(model).values())
    if input_ids is not None and input_ids.shape[1] != carrier.index.length:
        raise InvalidInputError(
            f"input_ids has {input_ids.shape[1]} positions, the cache has read "
            f"{carrier.index.length}; pass the tokens that it has read (the last token that was "
            "generated is not among them)"
        )

    def blobs() -> Iterator[Blob]:
        head = {"name": "session", "model": _digest(model), "notes": notes or {}}
        yield {**head, "index": carrier.index.facts()}, b""
        if input_ids is not None:
            yield _tensor("input_ids", input_ids)
        if carrier.index.valid is not None:
            yield _tensor("valid", carrier.index.valid)
        for number, layer in enumerate(cache.layers[:-1]):
            if layer.is_initialized and layer.keys.numel():
                seen = {"seen": layer.get_seq_length()}
                yield _tensor("keys", layer.keys, layer=number, **seen)
                yield _tensor("values", layer.values, layer=number, **seen)
        states = carrier.states
        if states.lengths is not None:
            yield _tensor("lengths", states.lengths)
        for number, state in states.adapters.items():
            assert isinstance(state, AdapterState)  # `settle` has seen to it
            yield _history("bits", state.values, layer=number)
            if state.keys is not None:
                yield _history("selection_keys", state.keys, layer=number)
            if state.memory is not None:
                yield {"name": "memory", "layer": number}, state.memory.to_bytes()
        if states.token is not None:
            yield _history("tokens", states.token.tokens, candidates=states.token.candidates)
            yield {"name": "token_memory"}, states.token.memory.to_bytes()
        if states.recent is not None:
            yield _history("recent", states.recent.tokens)
        if states.far is not None:
            yield _history("far", states.far.tokens, distance=states.far.distance)
            yield {"name": "far_memory"}, states.far.memory.to_bytes()
        for coded in states.coded.values():  # one, since all adapters have the same options
            yield {"name": "code_memory"}, coded.memory.to_bytes()

    write_blobs(path, blobs)


def load_session(path: str | os.PathLike[str], model: Any) -> Session:
    """Read a decoding state, for the model that made it.

    Args:
        path: a file that `save_session` wrote.
        model: the same model, attached alike, with the same weights and dtype.

    Raises:
        CheckpointError: a missing, damaged or foreign file, or one of another model.
        InvalidInputError: the model is not attached.
    """
    controller, decoder = controller_of(model), decoder_of(model)
    cache = DynamicCache(config=decoder.config)
    carrier = prepare_cache(cache, **controller.cache_options)
    device, adapters = next(decoder.parameters()).device, adapters_of(model)
    input_ids: Tensor | None = None
    notes: dict[str, Any] = {}
    index: dict[str, Any] | None = None
    tokens: dict[str, Any] = {}
    try:
        for head, data in read_blobs(path):
            name, number = head["name"], head.get("layer", 0)
            if name == "session":
                _check_model(path, head, model)
                notes, index = head["notes"], head["index"]
            elif name == "input_ids":
                input_ids = _read_tensor(head, data).to(device)
            elif name == "valid":
                carrier.index.valid = _read_tensor(head, data).to(device)
            elif name in ("keys", "values"):
                _fill(cache.layers[number], name, _read_tensor(head, data).to(device), head["seen"])
            elif name == "lengths":
                carrier.states.lengths = _read_tensor(head, data)
            elif name == "bits":
                history = _read_history(head, data)
                state = carrier.states.adapter(adapters[number], len(history.lengths))
                state.values = history
            elif name == "selection_keys":
                history = _read_history(head, data)
                state = carrier.states.adapter(adapters[number], len(history.lengths))
                state.keys = history
            elif name == "memory":
                memory = SuffixMemory.from_bytes(data, str(path))
                carrier.states.adapter(adapters[number], memory.batch).memory = memory
            elif name == "tokens":
                tokens = {"history": _read_history(head, data), "count": head["candidates"]}
            elif name == "token_memory":
                memory = SuffixMemory.from_bytes(data, str(path))
                token = TokenState(memory.batch, tokens["count"], 1)
                token.memory, token.tokens = memory, tokens["history"]
                carrier.states.token = token
            elif name == "recent":
                history = _read_history(head, data)
                carrier.states.recent_tokens(len(history.lengths)).tokens = history
            elif name == "far":
                history = _read_history(head, data)
                carrier.states.far_tokens(len(history.lengths), head["distance"]).tokens = history
            elif name == "far_memory":
                memory = SuffixMemory.from_bytes(data, str(path))
                assert carrier.states.far is not None
                carrier.states.far.memory = memory
            elif name == "code_memory":
                memory = SuffixMemory.from_bytes(data, str(path))
                exact = next(iter(adapters.values())).exact
                if exact is None:
                    raise ValueError("it has hash codes, and the model's addresses are learned")
                carrier.states.codes(exact, memory.batch).memory = memory
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the session {path} is damaged: {error}; save it again") from error
    if index is None:
        raise CheckpointError(f"the session {path} is empty; save it again")
    carrier.index.restore(index)
    return Session(cache, input_ids, notes)


def _carrier(model: Any, cache: Any) -> RosaCacheLayer:
    controller = controller_of(model)
    layers = getattr(cache, "layers", None) or [None]
    if not isinstance(layers[-1], RosaCacheLayer):
        raise InvalidInputError(
            f"this {type(cache).__name__} is not the cache of an attached model; pass the "
            "past_key_values that the model returned"
        )
    return prepare_cache(cache, **controller.cache_options)


def _digest(model: Any) -> dict[str, Any]:
    """What tells whether a state belongs to a model: sizes, options, and a sample of weights."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
            digest.update(str(tuple(parameter.shape)).encode() + picked.numpy().tobytes())
    controller, decoder = controller_of(model), decoder_of(model)
    training_only = (
        *("estimator", "estimator_options", "counterfactual_stride", "credit_margin"),
        *("adapter_dtype", "backend", "recall_offload"),
    )
    options = controller.config.to_dict()
    return {
        "class": type(decoder).__name__,
        "layers": decoder.config.num_hidden_layers,
        "dtype": str(decoder.dtype),
        "rosa": {name: value for name, value in options.items() if name not in training_only},
        "weights": digest.hexdigest(),
    }


def _check_model(path: str | os.PathLike[str], head: dict[str, Any], model: Any) -> None:
    saved, here = head["model"], _digest(model)
    for name, what in (
        ("class", "architecture"),
        ("layers", "number of layers"),
        ("dtype", "dtype"),
        ("rosa", "configuration of what is attached"),
        ("weights", "weights"),
    ):
        if saved[name] != here[name]:
            shown = f" ({saved[name]} there, {here[name]} here)" if name != "weights" else ""
            raise CheckpointError(
                f"the session {path} was saved by another model: its {what} differs{shown}; load "
                "the model that saved it, or read the prompt again"
            )


def _fill(layer: Any, name: str, states: Tensor, seen: int) -> None:
    """Put keys or values into an empty cache layer."""
    if not layer.is_initialized:
        layer.lazy_initialization(states, states)
    setattr(layer, name, states)
    if isinstance(layer, SinkWindowLayer | DynamicSlidingWindowLayer):
        layer.cumulative_length = seen
    assert isinstance(layer, DynamicLayer)


def _tensor(name: str, tensor: Tensor, **head: Any) -> Blob:
    data = tensor.detach().cpu().contiguous()
    raw = data.view(-1).view(torch.uint8).numpy()
    about = {"name": name, "dtype": str(data.dtype).split(".")[1], "shape": list(data.shape)}
    return {**about, **head}, raw.data


def _read_tensor(head: dict[str, Any], data: bytes | memoryview) -> Tensor:
    dtype = getattr(torch, head["dtype"])
    return torch.frombuffer(bytearray(data), dtype=dtype).view(head["shape"])


def _history(name: str, history: History, **head: Any) -> Blob:
    longest = int(history.lengths.max(initial=0))
    table = np.ascontiguousarray(history.table[:, :, :longest])
    about: dict[str, Any] = {"name": name, "dtype": table.dtype.name, "shape": list(table.shape)}
    about["lengths"] = history.lengths.tolist()
    return {**about, **head}, table.reshape(-1).view(np.uint8).data


def _read_history(head: dict[str, Any], data: bytes | memoryview) -> History:
    batch, width, _ = head["shape"]
    history = History(batch, width, np.dtype(head["dtype"]))
    history.table = np.frombuffer(data, head["dtype"]).reshape(head["shape"]).copy()
    history.lengths = np.array(head["lengths"], np.int64)
    return history
