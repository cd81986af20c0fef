"""`rosa` against the four published layers: selections and sign flips, so equality is exact."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.ops import rosa
from rosakit.ops.oracle import retrieve_oracle, suffix_match_oracle
from rosakit.symbols import pack


def layer_cases(data):
    for n in range(int(data["n"])):
        prefix = f"c{n:02d}_"
        yield {
            name.removeprefix(prefix): torch.from_numpy(value)
            for name, value in data.items()
            if name.startswith(prefix)
        }


def oracle_layer(q, k, v, e0, e1, bits):
    match = suffix_match_oracle(pack(q, bits), pack(k, bits))
    return retrieve_oracle(v, match.position, e0, e1, bits=bits), match


def with_null(y, match, e_null, bits):
    """Official layers read symbol 0 where nothing matched; ours give a named choice."""
    null = (match.position < 0).repeat_interleave(bits, 1).transpose(1, 2)
    return torch.where(null, e_null, y)


@pytest.mark.parametrize(
    "name, bits, fill",
    [
        ("layer_1bit", 1, None),
        ("layer_4bit", 4, "e0"),
        ("layer_qkv1", 1, "e0"),
        ("layer_qkv4", 4, None),
    ],
)
def test_layer(golden, name, bits, fill):
    for n, case in enumerate(layer_cases(golden(name))):
        if "x" in case:
            q = k = v = case["x"]
            e0, e1 = case["emb0"].flatten(), case["emb1"].flatten()
        else:
            q, k, v = case["q"], case["k"], case["v"]
            e1 = case["emb"].flatten()
            e0 = -e1
        y, match = oracle_layer(q, k, v, e0, e1, bits)
        expected = case["out"]
        if fill is not None:
            y = with_null(y, match, e0, bits)
        assert torch.equal(y, expected), f"oracle, case {n}"
        got = rosa(
            q,
            k,
            v,
            e0,
            e1,
            bits=bits,
            unmatched="zero" if fill is None else "null",
            e_null=None if fill is None else e0,
            backend="auto" if native.available() else "oracle",
        )
        assert torch.equal(got, expected), f"rosa, case {n}"
