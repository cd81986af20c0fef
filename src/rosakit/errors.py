"""Exceptions that rosakit raises on purpose.

Every message says what was wrong, what was expected and how to mend it. `RosakitError` is the
one class a caller has to catch; the command line prints it without a traceback and exits with 2.
Errors about arguments are `ValueError`/`TypeError` as well, so that generic code can catch them.
"""

from __future__ import annotations

import warnings


class RosakitError(Exception):
    """Base class of every error that rosakit raises on purpose."""


class InvalidInputError(RosakitError, ValueError):
    """An argument has a value that cannot be used: shape, range, combination."""


class InvalidTypeError(RosakitError, TypeError):
    """An argument has the wrong type or dtype."""


class UnsupportedModelError(RosakitError):
    """The model cannot be windowed, or a feature does not work with it."""


class CheckpointError(RosakitError):
    """A checkpoint, adapter or saved memory is missing, corrupt, foreign or too new."""


class DataError(RosakitError):
    """A data file is empty, undecodable or has the wrong format."""


class BackendError(RosakitError):
    """A backend was asked for by name and is not available here."""


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn once per process: of fallbacks to something slower, and of options that gain nothing."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
