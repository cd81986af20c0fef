"""Saved sessions go on exactly where they stopped, and refuse everything that is not theirs."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import CheckpointError, InvalidInputError
from rosakit.tuning import RosaConfig, attach, load_session, retention, save_session
from tests.tuning.test_cache import WHOLE, in_chunks
from tests.tuning.tiny import attached, build, pad_rows, positions_of, tokens


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    monkeypatch.setattr(retention, "RESERVE", 5)


@pytest.mark.parametrize(
    "options",
    [
        WHOLE,
        {**WHOLE, "address": "token", "global_layers": ()},
        {"granularity": "run", "bits": 16},
        {**WHOLE, "address": "hash", "bits": 8},
        {"address": "hash", "bits": 8, "hash_refine": True},
        {"window": None},
        {"adapters": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_loaded_session_goes_on_exactly(tmp_path, options, padded):
    ids, mask = tokens(2, 45), torch.ones(2, 45, dtype=torch.int64)
    if padded:
        ids[1, :7], mask[1, :7] = 0, 0
    model, path = attached(**options), tmp_path / "session"
    _, cache = in_chunks(model, ids[:, :30], [11, 19], mask[:, :30])
    save_session(path, model, cache, input_ids=ids[:, :30], notes={"turn": 1})
    found = load_session(path, attached(**options))
    assert torch.equal(found.input_ids, ids[:, :30])
    assert found.notes == {"turn": 1}
    assert found.cache.get_seq_length() == 30
    for go_on in (model, attached(**options)):
        for held in (cache, found.cache):
            held.crop(-3)
        for start, stop in ((27, 28), (28, 40), (40, 41)):
            wanted, got = (
                go_on(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions_of(mask)[:, start:stop],
                    past_key_values=held,
                ).logits
                for held in (cache, found.cache)
            )
            assert torch.equal(got, wanted)
        cache = load_session(path, go_on).cache
        found = load_session(path, go_on)


@torch.no_grad()
def test_bfloat16_and_rows_that_were_reordered(tmp_path):
    model = attach(build().bfloat16(), RosaConfig(window=9, adapter_dtype="auto", token_route=True))
    ids = tokens(3, 30)
    cache = model(ids, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    save_session(tmp_path / "s", model, cache)
    found = load_session(tmp_path / "s", model)
    assert found.input_ids is None
    step = tokens(3, 1, seed=5)
    wanted = model(step, past_key_values=cache).logits
    assert torch.equal(model(step, past_key_values=found.cache).logits, wanted)


@torch.no_grad()
def test_generate_continues_a_saved_turn(tmp_path):
    model, prompt = attached(**WHOLE), tokens(1, 25)
    greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    first = model.generate(prompt, return_dict_in_generate=True, **greedy)
    read = first.past_key_values.get_seq_length()
    save_session(tmp_path / "s", model, first.past_key_values, input_ids=first.sequences[:, :read])
    longer = torch.cat([first.sequences, tokens(1, 6, seed=3)], 1)
    wanted = model.generate(longer, **greedy)
    found = load_session(tmp_path / "s", model)
    assert torch.equal(longer[:, :read], found.input_ids)
    assert torch.equal(model.generate(longer, past_key_values=found.cache, **greedy), wanted)


@torch.no_grad()
def test_other_models_are_refused(tmp_path):
    model, ids, path = attached(**WHOLE), tokens(1, 20), tmp_path / "s"
    cache = model(ids, use_cache=True).past_key_values
    save_session(path, model, cache)
    changed = attached(**WHOLE)
    changed.model.layers[1].mlp.up_proj.weight.add_(1)
    for other, message in (
        (attached("qwen3", **WHOLE), "its architecture differs"),
        (attached(**{**WHOLE, "window": 8}), "configuration of what is attached differs"),
        (attached(noise=0.2, **WHOLE), "its weights differs"),
        (changed, "its weights differs"),
        (attached(**WHOLE).double(), "its dtype differs"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_session(path, other)
    with pytest.raises(InvalidInputError, match="has read 20"):
        save_session(path, model, cache, input_ids=ids[:, 1:])
    with pytest.raises(InvalidInputError, match="not the cache of an attached model"):
        save_session(path, model, None)


@torch.no_grad()
def test_damaged_files_are_refused_and_failed_saves_leave_the_old_one(tmp_path):
    model, path = attached(**WHOLE), tmp_path / "s"
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    save_session(path, model, cache)
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot read the session"):
        load_session(tmp_path / "none", model)
    for broken, message in (
        (b"other" + data, "no session of rosakit"),
        (data[:8] + b"\x09\0\0\0" + data[12:], "has format 9"),
        (data[:-1], "damaged|cut off"),
        (data[: len(data) // 2], "cut off"),
        (data[:12], "cut off"),
        (data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "damaged|cut off"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            load_session(path, model)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot save the session"):
        save_session(tmp_path / "no" / "folder", model, cache)
    middle = bytearray(data)
    middle[len(data) // 2] ^= 255
    path.write_bytes(bytes(middle))
    with pytest.raises(CheckpointError):
        load_session(path, model)


@torch.no_grad()
def test_pads_are_remembered(tmp_path):
    model = attached(**WHOLE)
    ids, mask = pad_rows([tokens(1, n, seed=n)[0] for n in (20, 3)], "left")
    _, cache = in_chunks(model, ids, [20], mask)
    save_session(tmp_path / "s", model, cache)
    found = load_session(tmp_path / "s", model).cache
    assert torch.equal(found.layers[-1].index.valid, mask != 0)
