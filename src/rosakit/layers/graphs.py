"""Keeping host work out of compiled graphs without loading the compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable` for code that is being compiled, nothing at all for other code.

    The bare decorator imports the compiler (and Triton) as soon as it decorates, which would be at
    ``import rosakit.layers``.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        found: R = torch.compiler.disable(function)(*args, **kwargs)
        return found

    return call
