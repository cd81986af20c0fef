"""`retrieve`: the read against the oracle, its gradient against autograd of the soft form."""

from __future__ import annotations

import pytest
import torch

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.ops import retrieve
from rosakit.ops.oracle import retrieve_oracle

UNMATCHED = ["zero", "self", "null"]


def example(batch=2, length=23, routes=3, bits=4, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    channels = routes * bits
    v = torch.randn(batch, length, channels, generator=g).to(dtype)
    limit = torch.arange(length).expand(batch, routes, length)
    position = (torch.rand(batch, routes, length, generator=g) * (limit + 2)).int() - 1
    position = position.clamp(max=length - 1).to(torch.int32)
    e0, e1, e_null = torch.randn(3, channels, generator=g).to(dtype)
    return v, position, e0, e1, e_null


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize(
    "bits, dtype", [(4, torch.float32), (1, torch.bfloat16), (11, torch.float16)]
)
def test_forward_is_the_oracle(unmatched, bits, dtype):
    v, position, e0, e1, e_null = example(bits=bits, dtype=dtype)
    e_null = e_null if unmatched == "null" else None
    options = {"bits": bits, "unmatched": unmatched, "e_null": e_null}
    expected = retrieve_oracle(v, position, e0, e1, **options)
    assert torch.equal(retrieve(v, position, e0, e1, **options), expected)
    strided = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(retrieve(strided, position, e0, e1, **options), expected)


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("length", [1, 2, 63])
def test_gradients(unmatched, length):
    """dv is autograd's of e0 + (e1 - e0) sigmoid(v); de0 and de1 follow the hard read."""
    v, position, e0, e1, e_null = (
        x.double() if x.is_floating_point() else x for x in example(length=length)
    )
    e_null = e_null if unmatched == "null" else None
    inputs = [x.requires_grad_() for x in (v, e0, e1, e_null) if x is not None]
    g = torch.randn_like(v.detach())
    y = retrieve(v, position, e0, e1, bits=4, unmatched=unmatched, e_null=e_null)
    got = torch.autograd.grad((g * y).sum(), inputs)

    index = position.repeat_interleave(4, 1).transpose(1, 2).long()
    own = torch.arange(length)[None, :, None]
    soft_v = v.sigmoid().gather(1, torch.where(index >= 0, index, own))
    live = torch.ones_like(index, dtype=torch.bool) if unmatched == "self" else index >= 0
    soft = torch.where(live, e0.detach() + (e1 - e0).detach() * soft_v, 0.0)
    (dv,) = torch.autograd.grad((g * soft).sum(), [v])
    hard = retrieve_oracle(v, position, e0, e1, bits=4, unmatched=unmatched, e_null=e_null)
    expected = [dv, *torch.autograd.grad((g * hard).sum(), inputs[1:])]
    for name, a, b in zip(("dv", "de0", "de1", "de_null"), got, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_opcheck():
    v, position, e0, e1, _ = example(length=9)
    for tensor in (v, e0, e1):
        tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.rosakit.retrieve.default, (v, position, e0, e1, None, 4, "zero")
    )


def test_bad_input():
    v, position, e0, e1, _ = example()
    with pytest.raises(InvalidInputError, match="position must have shape"):
        retrieve(v, position[:, :2], e0, e1, bits=4)
    with pytest.raises(InvalidTypeError, match="int32"):
        retrieve(v, position.long(), e0, e1, bits=4)
    with pytest.raises(InvalidInputError, match="e_null belongs"):
        retrieve(v, position, e0, e1, bits=4, unmatched="null")
    with pytest.raises(InvalidInputError, match="e1 must have shape"):
        retrieve(v, position, e0, e1[:-1], bits=4)
