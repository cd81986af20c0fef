"""Command-line flags made from the fields of configuration dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer

from rosakit.errors import InvalidInputError, InvalidTypeError
from rosakit.tuning.config import RosaConfig
from rosakit.tuning.data import DataConfig
from rosakit.tuning.settings import TuneConfig

__all__ = ["merge", "with_flags"]

_RENAMED = {"sources": "data"}
"""Flags that are not called like their field."""

_PARTS = {"data": DataConfig, "rosa": RosaConfig}
"""Fields of TuneConfig that are configurations themselves; their flags stand beside its own."""

_LENGTHS = ("steps", "tokens")
"""Fields of which a run has one: a flag for it overrides the other one, too."""

_PANELS = {"": "Run", "data": "Data", "rosa": "What is added to the model"}


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: the field it sets (inside `part`, "" for TuneConfig itself)."""

    part: str
    field: dataclasses.Field[Any]
    annotation: Any
    default: Any

    @property
    def name(self) -> str:
        return _RENAMED.get(self.field.name, self.field.name)

    @property
    def kind(self) -> str:
        """How its text is read: bool, words, integers, mapping, int, float or text."""
        plain = _without_none(self.annotation)
        origin = typing.get_origin(plain)
        if origin is tuple:
            return "words" if typing.get_args(plain)[0] is str else "integers"
        if origin is dict:
            return "mapping"
        return {bool: "bool", int: "int", float: "float"}.get(plain, "text")

    def parameter(self) -> inspect.Parameter:
        """The function parameter from which typer makes the flag."""
        metavar = {"integers": "N,N,…", "mapping": "{…}", "words": "TEXT"}.get(
            self.kind, self.kind.upper()
        )
        choices = typing.get_args(_without_none(self.annotation))
        if self.kind == "text" and choices:
            metavar = "|".join(map(str, choices))
        names = f"--{self.name.replace('_', '-')}"
        if self.kind == "bool":
            names += f"/--no-{self.name.replace('_', '-')}"
        spellings = [names]
        if self.kind == "mapping":  # a single one reads better in the singular
            spellings.insert(0, names.removesuffix("s"))
        option = typer.Option(
            *spellings,
            help=f"{self.field.metadata['help']} (default: {self._shown()})",
            show_default=False,
            rich_help_panel=_PANELS[self.part],
            metavar=None if self.kind == "bool" else metavar,
        )
        taken: Any = {"bool": bool | None, "words": list[str] | None}.get(self.kind, str | None)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[taken, option],
        )

    def read(self, value: Any) -> Any:
        """The field's value from what typer parsed."""
        if self.kind in ("bool", "words"):
            return value
        text = str(value).strip()
        if text.lower() == "none" and type(None) in typing.get_args(self.annotation):
            return None
        try:
            if self.kind == "int":
                return int(text.replace("_", ""))
            if self.kind == "float":
                return float(text)
            if self.kind == "integers":
                return [int(part) for part in text.split(",") if part.strip()]
        except ValueError as error:
            raise InvalidInputError(
                f"--{self.name.replace('_', '-')} takes {_WANTED[self.kind]}, got {text!r}"
            ) from error
        return _mapping(self.name, text) if self.kind == "mapping" else text

    def _shown(self) -> str:
        value = self.default
        if isinstance(value, bool):
            return "yes" if value else "no"
        if value is None or value == () or value == {} or value == "":
            return "none"
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "integers": "whole numbers with commas between them",
}


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``(..., flags: dict)`` one flag for every field instead of `flags`."""
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.name != "flags"
    ]
    added = {flag.name: flag for flag in _flags()}

    def command(**given: Any) -> None:
        flags = {n: given.pop(n) for n in added}
        function(**given, flags={n: v for n, v in flags.items() if v is not None and v != []})

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    parameters = [*own, *(flag.parameter() for flag in added.values())]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def merge(values: Mapping[str, Any], flags: Mapping[str, Any]) -> TuneConfig:
    """A configuration from the values of a file and the flags that override them.

    Raises:
        InvalidInputError: an unknown field or a value that cannot be used.
        InvalidTypeError: a value of the wrong type.
    """
    out = dict(values)
    known = {flag.name: flag for flag in _flags()}
    for one, other in (_LENGTHS, _LENGTHS[::-1]):
        if one in flags and other not in flags and known[one].read(flags[one]) is not None:
            out.pop(other, None)
    for name, value in flags.items():
        flag = known[name]
        if flag.part:
            part = out.get(flag.part)
            if flag.part == "data" and not isinstance(part, Mapping):
                part = {} if part is None else {"sources": part}
            if not isinstance(part, Mapping | None):
                raise InvalidTypeError(
                    f"TuneConfig.{flag.part} must be a mapping of its fields, got {part!r}"
                )
            out[flag.part] = {**(part or {}), flag.field.name: flag.read(value)}
        else:
            out[flag.field.name] = flag.read(value)
    return TuneConfig.from_dict(out)


def _flags() -> Iterator[_Flag]:
    defaults = TuneConfig(model="-")
    for part, kind in (("", TuneConfig), *_PARTS.items()):
        holder = getattr(defaults, part) if part else defaults
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if part or field.name not in _PARTS:
                shown = None if field.name == "model" else getattr(holder, field.name)
                yield _Flag(part, field, hints[field.name], shown)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _mapping(name: str, text: str) -> Any:
    """``{a: 1, b: 2}``, or ``a=1,b=2`` for plain values."""
    import yaml

    wanted = f"--{name.replace('_', '-')} must be a mapping like a=1,b=2 or {{a: 1, b: 2}}"
    try:
        if "=" in text and not text.startswith("{"):
            parts = [part.partition("=") for part in text.split(",")]
            found: Any = {key.strip(): yaml.safe_load(value) for key, _, value in parts}
        else:
            found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{wanted}: {text!r}") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{wanted}, got {text!r}")
    return found
