"""Linear maps of a few tokens, launched with little host work: parts of a decoding step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from rosakit.cuda import compile

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that kernels read channels in, by their number in ``format.cuh``."""

_WARPS = 8

X, ONTO, Y = 0, 4, 5
"""Which arguments are the addresses of x, of what is added to, and of y."""


def prepare(
    x: int,
    weights: Sequence[int],
    y: int,
    *,
    inputs: int,
    outputs: int,
    tokens: int,
    formats: tuple[int, int, int],
    index: int | None,
    onto: int = 0,
    apart: bool = False,
) -> compile.Prepared:
    """``y[t, p] = W_p x[t, p]`` for up to three maps, and what is added to it.

    Everything is given by its address on the device, of which nothing is checked. x is read in the
    weights' dtype and sums are float32; the product is rounded to the weights' dtype, then to that
    of y, then added and rounded again, as a chain of separate operators does it.

    Args:
        x: ``[tokens, inputs]`` that all parts read, or ``[tokens, parts, inputs]`` if `apart`.
            Another address may take its place, on a boundary of 16 bytes if this is (as 0 is).
        weights: ``[outputs, inputs]`` each, of one to three parts.
        y: ``[tokens, parts, outputs]``.
        inputs, outputs, tokens: sizes.
        formats: of x, the weights, and y, from `FORMATS`.
        index: number of the CUDA device.
        onto: ``[tokens, outputs]`` of the dtype of y, for a single part; 0 for none.
        apart: every part reads its own.
    """
    parts = len(weights)
    first, second, third = [*weights, *[weights[0]] * (3 - parts)]
    x_token, x_part = (parts * inputs, inputs) if apart else (inputs, 0)
    wide = inputs % 8 == 0 and (x | first | second | third) % 16 == 0
    return _kernel(*formats, index).prepare(
        (-(-outputs // _WARPS), parts, tokens),
        32 * _WARPS,
        (x, first, second, third, onto, y, inputs, outputs, parts, x_token, x_part, wide),
    )


@functools.cache
def _kernel(x: int, weight: int, y: int, index: int | None) -> compile.Kernel:
    assert index is not None, "the kernel runs on CUDA devices"
    macros = {"X_SCALAR": x, "SCALAR": weight, "Y_SCALAR": y}
    with torch.cuda.device(index):
        device = torch.device("cuda", index)
        return compile.load(("format.cuh", "project.cu"), ("project",), macros, device)["project"]
