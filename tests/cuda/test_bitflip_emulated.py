"""The GPU's sweep over single-bit flips, run on the CPU, against the core's and the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rosakit import native
from rosakit.cuda import bitflip as launcher
from rosakit.native import bitflip as native_bitflip
from rosakit.ops.estimators.bitflip_credit import credit_core, credit_naive
from rosakit.ops.estimators.registry import MatchOptions
from rosakit.symbols import pack, unpack
from tests.cuda import emulated_bitflip
from tests.streams import FAMILIES, make

LIMITS = [232448, 1500, 0]  # arrays in shared memory: all, some, none


def example(length, bits, seed, dtype=torch.float64, batch=2, routes=2):
    """q, k, v, gradient and levels; q a noisy copy of k, which is a named stream."""
    g = torch.Generator().manual_seed(seed)
    families = [FAMILIES[(seed + n) % len(FAMILIES)] for n in range(batch * routes)]
    streams = [np.resize(make(f, length, 2**bits, seed), length) for f in families]
    k = torch.from_numpy(np.stack(streams)).view(batch, routes, length)
    fresh = torch.randint(0, 2**bits, k.shape, generator=g)
    q = torch.where(torch.rand(k.shape, generator=g) < 0.15, fresh, k)
    q, k = (unpack(x, bits).to(dtype) * 2 - 1 for x in (q, k))
    v, grad = torch.randn(2, *q.shape, generator=g, dtype=dtype)
    levels = torch.randn(3, routes * bits, generator=g, dtype=dtype)
    return q, k, v, grad, *levels


def packed(length):
    starts = torch.zeros(2, length, dtype=torch.int32)
    starts[0, length // 3 :] = length // 3
    starts[1, -3:] = -1
    return starts


@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
@pytest.mark.parametrize("length, bits", [(1, 1), (40, 1), (33, 3), (14, 8)])
def test_kernel_is_the_definition(length, bits, tied):
    q, k, v, grad, e0, e1, e_null = example(length, bits, length + bits)
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    for n, unmatched in enumerate(("zero", "self", "null")):
        options = {"max_length": (3, None, None)[n], "min_length": (1, 1, 2)[n]}
        starts = packed(length) if n and length > 8 else None
        null = e_null if unmatched == "null" else None
        expected = credit_naive(
            grad,
            *(q, k, v, e0, e1, null),
            bits=bits,
            match=MatchOptions(segment_starts=starts, **options),
            unmatched=unmatched,
            tied=tied,
        )
        got = emulated_bitflip.bitflip_credit(
            *(pack(x, bits) for x in (q, k, v)),
            *(grad, e0, e1, null),
            tied=tied != "none",
            flip_values=tied == "qkv",
            unmatched_self=unmatched == "self",
            segment_starts=starts,
            shared_limit=LIMITS[n],
            **options,
        )
        for name, a, b in zip(("q", "k"), got, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=0, atol=1e-10, msg=lambda m, x=name, y=unmatched: f"{x} {y}: {m}"
            )


@pytest.mark.skipif(
    not native.available() or not native_bitflip.built(), reason="compiled core missing or old"
)
@pytest.mark.parametrize("tied", ["none", "qk", "qkv"])
@pytest.mark.parametrize("seed, length, bits", [(1, 100, 1), (2, 70, 4), (3, 20, 8)])
def test_kernel_and_core_agree_to_the_last_bit(seed, length, bits, tied):
    """Same terms in the same order: float32 gradients come out identical."""
    q, k, v, grad, e0, e1, e_null = example(length, bits, seed, torch.float32)
    q, v = (k if tied != "none" else q), (k if tied == "qkv" else v)
    match = MatchOptions(segment_starts=packed(length) if seed > 1 else None)
    expected = credit_core(
        grad, q, k, v, e0, e1, e_null, bits=bits, match=match, unmatched="null", tied=tied
    )
    got = emulated_bitflip.bitflip_credit(
        *(pack(x, bits) for x in (q, k, v)),
        *(grad, e0, e1, e_null),
        tied=tied != "none",
        flip_values=tied == "qkv",
        segment_starts=match.segment_starts,
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_plans_fit():
    """Every stream length gets a plan within the GPU's limits."""
    for length in (1, 127, 1000, 4096, 16384, launcher.MAX_POSITIONS):
        for bits in (1, 4, 8):
            for tied in (False, True):
                plan = launcher.plan(length, bits, tied, 232448)
                assert plan.shared_bytes <= 232448
                assert plan.resident * plan.threads <= 2048
                held = plan.shared_bytes + plan.scratch_bytes
                assert held >= (20 + 12 * bits) * length
