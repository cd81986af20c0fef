"""Finds the compiled extension and says why when it cannot."""

from __future__ import annotations

import importlib
from typing import Any

from rosakit.errors import BackendError, InvalidInputError

_core: Any = None
_reason = ""
try:
    _core = importlib.import_module("rosakit.native._core")
except ImportError as error:  # not built, or built for another interpreter
    _reason = str(error)


def available() -> bool:
    """Whether the compiled core was found."""
    return _core is not None


def core() -> Any:
    """The extension module.

    Raises:
        BackendError: it is not there.
    """
    if _core is None:
        raise BackendError(
            f"the compiled core of rosakit is not available ({_reason}); "
            "install rosakit with `pip install .` where a C++20 compiler is found, "
            "or use backend='oracle'"
        )
    return _core


def num_threads() -> int:
    """Threads that one call of the core may use.

    Starts at ``ROSAKIT_NUM_THREADS``, or else at the cores this process may run on, divided by
    ``LOCAL_WORLD_SIZE``.
    """
    return int(core().num_threads())


def pages_copied() -> int:
    """Pages of 4 KiB that memories of this process copied so far.

    Forks share their pages and copy one when they first write to it: the difference of two calls
    tells what a fork cost after the fact.

    Raises:
        BackendError: the C++ core is not built.
    """
    return int(core().pages_copied())


def set_num_threads(n: int) -> None:
    """Set the number of threads that one call of the core may use, 1 to 1024."""
    if not 1 <= n <= 1024:
        raise InvalidInputError(f"num_threads must be between 1 and 1024, got {n}")
    core().set_num_threads(n)
