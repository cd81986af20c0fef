"""Fields of configuration dataclasses: help texts, ranges, and one check of them all.

Free of transformers, so that the command line can show its help quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rosakit.errors import InvalidInputError, InvalidTypeError

__all__ = ["check_fields", "check_names", "option"]


def option(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its help text and its range.

    Args:
        default: the default value.
        help_text: becomes the help of the flag of the same name.
        low, high: least and greatest value.
        above, below: bounds that are not values themselves.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help_text, **bounds})


def check_fields(config: Any, kind: type[Any] | None = None) -> None:
    """Check each field of a dataclass against its annotation and range.

    Args:
        config: the instance.
        kind: the class whose fields are checked, for subclasses that mix in foreign fields; None
            for its own.

    Values are stored in the annotated type: lists become tuples, a single name a tuple of one,
    paths text, and numbers that YAML reads as text (``1e-4``, without a point) numbers.

    Raises:
        InvalidTypeError: a value of the wrong type; the message names field, type and value.
        InvalidInputError: a value out of range or none of the choices.
    """
    kind = type(config) if kind is None else kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{kind.__name__}.{field.name}"
        value = _read(name, getattr(config, field.name), hints[field.name])
        if isinstance(value, int | float):
            _check_range(name, value, field.metadata)
        setattr(config, field.name, value)


def check_names(kind: type[Any], values: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are no field of a dataclass.

    Raises:
        InvalidInputError: an unknown key; the message names the nearest field.
    """
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            raise InvalidInputError(f"{where} has no field {name!r}; {hint}")


def _read(name: str, value: Any, annotation: Any) -> Any:
    """The value in the annotated type."""
    wanted, or_none = annotation, ""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        if value is None:
            return None
        wanted = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
        or_none = " or none"

    def refuse(what: str) -> InvalidTypeError:
        return InvalidTypeError(f"{name} must be {what}{or_none}, got {value!r}")

    origin = typing.get_origin(wanted)
    if origin is Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise InvalidInputError(
                f"{name} must be one of {', '.join(choices)}{or_none}; got {value!r}"
            )
    elif origin is tuple:
        return _items(value, typing.get_args(wanted)[0], refuse)
    elif origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise refuse("a mapping with names as keys")
        return dict(value)
    elif wanted is float:
        return _number(value, refuse)
    elif wanted is str:
        if not isinstance(value, str | os.PathLike):
            raise refuse("text")
        return os.fspath(value)
    elif not _is(value, wanted):
        words = {int: "an integer", bool: "true or false"}
        raise refuse(words.get(wanted, f"a mapping of the fields of {wanted.__name__}"))
    return value


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _items(value: Any, kind: Any, refuse: Any) -> tuple[Any, ...]:
    words = kind is str
    if words and isinstance(value, str | os.PathLike):
        value = (value,)
    what = "a name or a list of names" if words else "a list of integers"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise refuse(what)
    items = tuple(value)
    if not all(isinstance(v, str | os.PathLike) if words else _is(v, kind) for v in items):
        raise refuse(what)
    return tuple(os.fspath(v) for v in items) if words else items


def _number(value: Any, refuse: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refuse("a number")
    try:
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise refuse("a number") from error
    if not math.isfinite(found):
        raise refuse("a finite number")
    return found


def _check_range(name: str, value: float, bounds: Mapping[str, Any]) -> None:
    tests = {
        "low": ("at least", lambda bound: value >= bound),
        "high": ("at most", lambda bound: value <= bound),
        "above": ("above", lambda bound: value > bound),
        "below": ("below", lambda bound: value < bound),
    }
    for kind, (words, holds) in tests.items():
        bound = bounds.get(kind)
        if bound is not None and not holds(bound):
            raise InvalidInputError(f"{name} must be {words} {bound}, got {value}")
