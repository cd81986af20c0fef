"""RosaConfig: what it accepts, what it refuses, and how it travels."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.tuning.config import RosaConfig


def test_round_trip_through_json():
    config = RosaConfig(
        window=None,
        layers=(0, -1),
        bits=2,
        estimator_options={"key_credit": "successor"},
        token_route=True,
    )
    assert RosaConfig.from_json(config.to_json()) == config
    assert RosaConfig.from_dict(config.to_dict()) == config
    assert RosaConfig(layers=[0, -1]).layers == (0, -1)


def test_every_field_has_help():
    texts = RosaConfig.help()
    assert set(texts) == {f.name for f in dataclasses.fields(RosaConfig)}
    assert all(text.endswith(".") and len(text) > 20 for text in texts.values())


@pytest.mark.parametrize(
    "values,message",
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -4}, "window must be at least 1"),
        ({"sink_tokens": -1}, "sink_tokens must be at least 0"),
        ({"bits": 0}, "bits must be at least 1"),
        ({"bits": 17}, "bits must be at most 16"),
        ({"routes": 0}, "routes must be at least 1"),
        ({"value_groups": 0}, "value_groups must be at least 1"),
        ({"routes": 6, "value_groups": 4}, r"divide the number of routes \(6\), got 4"),
        ({"min_length": 0}, "min_length must be at least 1"),
        ({"max_length": 2, "min_length": 3}, "nothing could ever match"),
        ({"inject": "before"}, "one of post_attn, pre_attn; got 'before'"),
        ({"unmatched": "none"}, "one of zero, self, null"),
        ({"address": "psychic"}, "one of learned, token, hash"),
        ({"address": "hash", "hash_orders": (0,)}, "tokens of each context"),
        ({"hash_refine": True}, "use it with address='hash'"),
        ({"address": "token", "shared_qk": True}, "shares learned projections"),
        ({"address": "token", "estimator": "bitflip"}, "'token' has none that learn"),
        ({"address": "hash", "estimator": "bitflip"}, "'hash' has none that learn"),
        ({"address": "token", "counterfactual_stride": 4}, "none that learn"),
        ({"address": "token", "estimator_options": {"temperature": 2.0}}, "none that learn"),
        ({"length_tiers": (1, 2)}, "minimal lengths"),
        ({"address": "hash", "address_candidates": 2}, "address='token' for more than 1"),
        ({"far_distance": 9}, "use address='token'"),
        ({"address": "hash", "credit_margin": 1.0}, "limits the gradient"),
        ({"address": "token", "granularity": "run"}, "granularity='token'"),
        ({"address": "token", "max_length": 8}, "leave max_length at none"),
        ({"layers": (1, 1)}, "names a layer twice"),
        ({"window": None, "global_layers": (0,)}, "only means something beside a window"),
        ({"window": None, "adapters": False}, "adds nothing"),
        ({"estimator": "guess"}, "unknown estimator 'guess'"),
        ({"estimator_options": {"speed": 1}}, "does not take speed"),
        ({"token_candidates": 0}, "token_candidates must be at least 1"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(InvalidInputError, match=message):
        RosaConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"window": 2.5},
        {"window": True},
        {"bits": "4"},
        {"layers": "0,1"},
        {"layers": 3},
        {"layers": [0.5]},
        {"own_value": 1},
        {"token_route": "yes"},
        {"estimator": None},
        {"estimator_options": [1]},
        {"estimator_options": {1: 2}},
    ],
)
def test_wrong_types(values):
    with pytest.raises(InvalidTypeError, match=next(iter(values))):
        RosaConfig(**values)


def test_an_unknown_key_names_the_nearest_field():
    with pytest.raises(InvalidInputError, match="'sink_token'; did you mean 'sink_tokens'"):
        RosaConfig.from_dict({"sink_token": 4})
    with pytest.raises(InvalidInputError, match="the fields are window"):
        RosaConfig.from_dict({"zzz": 4})
    with pytest.raises(InvalidInputError, match="not a JSON configuration"):
        RosaConfig.from_json("{")
    with pytest.raises(InvalidInputError, match="JSON object"):
        RosaConfig.from_json("[]")


def test_the_module_needs_neither_transformers_nor_peft():
    code = (
        "import importlib.util, sys; sys.modules['transformers'] = sys.modules['peft'] = None\n"
        "import rosakit.errors\n"
        "spec = importlib.util.find_spec('rosakit').submodule_search_locations[0]\n"
        "spec = importlib.util.spec_from_file_location('c', spec + '/tuning/config.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['c'] = module\n"
        "spec.loader.exec_module(module); module.RosaConfig()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
