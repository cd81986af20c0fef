"""Bits to symbols and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosakit import symbols
from rosakit.errors import InvalidInputError, InvalidTypeError


@given(bits=st.integers(1, 16), routes=st.integers(1, 4), length=st.integers(0, 9))
def test_round_trip(bits, routes, length):
    x = torch.randn(2, length, routes * bits, generator=torch.Generator().manual_seed(bits))
    packed = symbols.pack(x, bits)
    assert packed.shape == (2, routes, length)
    assert packed.dtype == (torch.uint8 if bits <= 8 else torch.uint16)
    assert torch.equal(symbols.unpack(packed, bits), x > 0)


def test_channel_is_bit_of_route():
    x = torch.tensor([[[1.0, -1.0, 2.0, -0.5, 0.5, 0.0]]])
    assert symbols.pack(x, 3).tolist() == [[[0b101], [0b010]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_of_either_sign_and_nan_are_bit_zero(dtype):
    x = torch.tensor([[[0.0, -0.0, float("nan"), 1e-7]]], dtype=dtype)
    assert symbols.pack(x, 4).item() == 8


def test_non_contiguous():
    x = torch.randn(2, 12, 7).transpose(1, 2)
    assert torch.equal(symbols.pack(x, 4), symbols.pack(x.contiguous(), 4))


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(InvalidInputError, match=r"1\.\.16"):
        symbols.pack(torch.randn(1, 2, 16), bits)


def test_bad_channels():
    with pytest.raises(InvalidInputError, match="choose bits that divide 10"):
        symbols.pack(torch.randn(1, 2, 10), 4)
    with pytest.raises(InvalidTypeError, match="floating point or bool"):
        symbols.pack(torch.zeros(1, 2, 8, dtype=torch.int64), 4)
    with pytest.raises(InvalidInputError, match=r"\[B, T, C\]"):
        symbols.pack(torch.randn(2, 8), 4)
