"""The retrieval and credit kernels, run on the CPU, against the plain torch forms."""

from __future__ import annotations

import importlib

import pytest
import torch

from rosakit import symbols
from rosakit.ops import suffix_match
from rosakit.ops.estimators.counterfactual import credit_naive
from tests.cuda import emulated

retrieve_ops = importlib.import_module("rosakit.ops.retrieve")

CASES = [
    pytest.param(4, 2, 70, 6, torch.float32, False, id="M4-B2-T70-R6"),
    pytest.param(4, 1, 33, 34, torch.bfloat16, False, id="M4-B1-T33-R34-bf16"),
    pytest.param(3, 1, 65, 3, torch.float32, True, id="M3-B1-T65-R3-fixed"),
    pytest.param(1, 1, 2, 5, torch.float32, False, id="M1-B1-T2-R5"),
    pytest.param(8, 1, 40, 2, torch.bfloat16, True, id="M8-B1-T40-R2-bf16-fixed"),
    pytest.param(4, 1, 1, 1, torch.float32, False, id="M4-B1-T1-R1"),
]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    error = (got.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-20)) if error else 0.0


@pytest.mark.parametrize("bits, batch, length, routes, dtype, fixed", CASES)
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize("key_credit, soft", [("matched", True), ("successor", False)])
@pytest.mark.parametrize("granularity", ["token", "run"])
def test_kernels_equal_the_plain_forms(
    bits, batch, length, routes, dtype, fixed, unmatched, key_credit, soft, granularity
):
    generator = torch.Generator().manual_seed(length)
    channels = routes * bits

    def real(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v, grad = (real(batch, length, channels) for _ in range(4))
    e0, e1 = real(channels), real(channels)
    e_null = real(channels) if unmatched == "null" else None
    packed_q, packed_k = symbols.pack(q, bits), symbols.pack(k, bits)
    assert torch.equal(emulated.pack(q, bits), packed_q)
    found = suffix_match(
        packed_q,
        packed_k,
        granularity=granularity,
        counterfactual_bits=bits,
        min_length=2 if length > 60 else 1,
        backend="oracle",
    )
    y = emulated.retrieve(v, found.position, e0, e1, e_null, bits, unmatched)
    plain = retrieve_ops.retrieve_forward(v, found.position, e0, e1, e_null, bits, unmatched)
    assert torch.equal(y, plain)

    options = {
        "bits": bits,
        "unmatched": unmatched,
        "key_credit": key_credit,
        "soft_values": soft,
        "temperature": 1.5,
    }
    sources = None
    if granularity == "run" and key_credit == "matched":
        counterfactual = importlib.import_module("rosakit.ops.estimators.counterfactual")
        sources = counterfactual._credit_sources(packed_k, None)
    got = emulated.credit(
        grad,
        *(q, k, v, e0, e1, found.position, found.cf_position),
        **options,
        credit_from=sources,
        fixed=fixed,
    )
    dv, de0, de1, de_null = retrieve_ops.retrieve_backward(
        grad, v, found.position, e0, e1, bits, unmatched
    )
    dq, dk = credit_naive(
        grad,
        *(q, k, v, e0, e1, found.position, found.cf_position, None),
        granularity=granularity,
        **options,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    named = zip(
        ("dq", "dk", "dv", "de0", "de1", "de_null"),
        got,
        (dq, dk, dv, de0, de1, de_null),
        strict=True,
    )
    for name, mine, expected in named:
        if name == "de_null" and unmatched != "null":
            continue  # nobody reads it then
        assert relative(mine, expected) < tolerance, name
