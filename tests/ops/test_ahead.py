"""A match begun ahead, and the pipeline as a backend: the numbers of the other backends."""

from __future__ import annotations

import pytest
import torch

from rosakit import native
from rosakit.errors import BackendError, InvalidInputError
from rosakit.ops import ahead, rosa, suffix_match

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled core is missing")


def leaves(bits=4, batch=2, length=70, routes=3):
    torch.manual_seed(bits)
    shapes = [(batch, length, routes * bits)] * 3 + [(routes * bits,)] * 3
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def graded(given, bits, unmatched, **options):
    q, k, v, e0, e1, e_null = inputs = leaves(bits)
    if given:
        begin = {"max_length", "min_length", "granularity", "successor", "segment_starts"}
        passed = {name: value for name, value in options.items() if name in begin}
        options["given"] = ahead.begin(q, k, bits=bits, **passed)
    null = e_null if unmatched == "null" else None
    y, match = rosa(
        *(q, k, v, e0, e1),
        bits=bits,
        unmatched=unmatched,
        e_null=null,
        return_match=True,
        **options,
    )
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, *match, *(x.grad for x in inputs)]


@pytest.mark.parametrize("bits", [3, 4, 9])
@pytest.mark.parametrize("unmatched", ["zero", "self", "null"])
@pytest.mark.parametrize(
    "options", [{}, {"granularity": "run", "min_length": 2}, {"key_credit": "successor"}]
)
def test_a_given_match_has_the_same_outputs_and_gradients(bits, unmatched, options):
    mine, right = (graded(given, bits, unmatched, **options) for given in (True, False))
    for a, b in zip(mine, right, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_without_gradients_no_queries_are_flipped():
    q, k, v, e0, e1, _ = leaves()
    with torch.no_grad():
        begun = ahead.begin(q, k, bits=4)
        y = rosa(q, k, v, e0, e1, bits=4, given=begun)
        assert begun.result().cf_position is None
        assert torch.equal(y, rosa(q, k, v, e0, e1, bits=4))
    with pytest.raises(InvalidInputError, match="credit=True"):
        rosa(q, k, v, e0, e1, bits=4, given=begun)


def test_the_pipeline_is_a_backend():
    q, k = torch.randint(0, 16, (2, 2, 3, 50), dtype=torch.uint8)
    starts = torch.zeros(2, 50, dtype=torch.int32)
    starts[:, 20:] = 20
    for options in ({}, {"counterfactual_bits": 4}, {"segment_starts": starts}):
        mine = suffix_match(q, k, backend="pipeline", **options)
        right = suffix_match(q, k, backend="cpu", **options)
        for a, b in zip(mine, right, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_only_the_counterfactual_estimator_reads_a_given_match():
    q, k, v, e0, e1, _ = leaves()
    with pytest.raises(InvalidInputError, match="bitflip"):
        rosa(q, k, v, e0, e1, bits=4, estimator="bitflip", given=ahead.begin(q, k, bits=4))


def test_the_read_passes_opcheck():
    q, k, v, e0, e1, e_null = leaves(batch=1, length=12)
    match = ahead.begin(q, k, bits=4).result()
    torch.library.opcheck(
        torch.ops.rosakit.counterfactual_read.default,
        (
            *(q, k, v, e0, e1, e_null, None, match.position, match.cf_position),
            *(4, "token", "null", "matched", True, 1.0),
        ),
    )


def test_compilation_is_refused_clearly():
    q, k, v, e0, e1, _ = leaves(batch=1, length=8)

    def read(q, k):
        return rosa(q, k, v, e0, e1, bits=4, given=ahead.begin(q, k, bits=4))

    with pytest.raises((BackendError, torch._dynamo.exc.TorchDynamoException), match="compile"):
        torch.compile(read, backend="eager", fullgraph=True)(q, k)
