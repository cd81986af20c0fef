"""The oracle and the core against the reference functions of official ROSA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit import native
from rosakit.ops import suffix_match

BACKENDS = [
    "oracle",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not native.available(), reason="compiled core missing")
    ),
]


def cases(data, *names):
    offsets = data["offsets"]
    for i in range(len(offsets) - 1):
        yield i, *(data[name][offsets[i] : offsets[i + 1]] for name in names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_self_stream(golden, backend):
    data = golden("stream_rosa")
    for i, x, y in cases(data, "x", "y"):
        symbols = torch.from_numpy(x.astype(np.int32))
        match = suffix_match(symbols, symbols, backend=backend)
        read = torch.where(match.position >= 0, symbols[match.position.clamp(min=0)], -1)
        assert read.tolist() == y.tolist(), f"case {i}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_qkv_stream(golden, backend):
    data = golden("stream_qkv")
    for i, q, k, v, pos, y_raw in cases(data, "q", "k", "v", "pos", "y_raw"):
        match = suffix_match(torch.from_numpy(q), torch.from_numpy(k), backend=backend)
        assert match.position.tolist() == pos.tolist(), f"case {i}"
        values = torch.from_numpy(v.astype(np.int64))
        read = torch.where(match.position >= 0, values[match.position.clamp(min=0)], -1)
        assert read.tolist() == y_raw.tolist(), f"case {i}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(golden, backend):
    streams = list(cases(golden("stream_qkv"), "q", "k", "v"))
    data = golden("stream_slow4")
    for i, idx, ln in cases(data, "idx", "ln"):
        _, q, k, v = streams[int(data["case"][i])]
        match = suffix_match(torch.from_numpy(q), torch.from_numpy(k), backend=backend)
        assert match.length.tolist() == ln.tolist(), f"case {i}"
        values = torch.from_numpy(v.astype(np.int64))
        read = torch.where(match.position >= 0, values[match.position.clamp(min=0)], 0)
        assert read.tolist() == idx.tolist(), f"case {i}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [2, 3])
def test_min_length_drops_what_the_reference_found_short(golden, backend, limit):
    streams = list(cases(golden("stream_qkv"), "q", "k", "pos"))
    data = golden("stream_slow4")
    for i, ln in cases(data, "ln"):
        _, q, k, pos = streams[int(data["case"][i])]
        match = suffix_match(
            torch.from_numpy(q), torch.from_numpy(k), min_length=limit, backend=backend
        )
        assert match.length.tolist() == np.where(ln >= limit, ln, 0).tolist(), f"case {i}"
        assert match.position.tolist() == np.where(ln >= limit, pos, -1).tolist(), f"case {i}"
