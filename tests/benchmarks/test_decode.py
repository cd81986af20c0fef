"""What the decode benchmark changes for a variant is undone after it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decode
from rosakit.layers.step import step
from rosakit.tuning import inject, is_attached


@pytest.mark.parametrize("name", ["window", decode.SEPARATE[0]])
def test_a_variant_is_taken_off_whole(name):
    model = decode.build(decode.SMALL, "cpu", torch.float32)
    decode.put_on(model, name, 32)
    assert (inject.step is step) == (name not in decode.SEPARATE)
    decode.take_off(model, name)
    assert inject.step is step
    assert not is_attached(model)


def test_the_check_of_the_variants_leaves_the_step_as_it_was():
    assert decode.check("cpu", [decode.SEPARATE[0]])
    assert inject.step is step
