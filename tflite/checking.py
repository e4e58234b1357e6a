"""Whether a dataclass that was filled from JSON holds values of the types that its fields declare."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any


def check_values(value: Any) -> None:
    """Goes through a dataclass and everything in it; numbers must be finite.

    Raises:
        ValueError: a value is of another type, or is infinite or not a number; the message names the field.
    """
    _check(value, type(value), type(value).__name__.lower())


def _check(value: Any, kind: Any, name: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _require(isinstance(value, kind), value, name)
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            _check(getattr(value, field.name), hints[field.name], f"{name}.{field.name}")
    elif origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return
        (other,) = (argument for argument in arguments if argument is not type(None))  # only "X | None" is in use
        _check(value, other, name)
    elif origin is list or (origin is tuple and arguments[1:] == (...,)):
        _require(isinstance(value, origin), value, name)
        for entry in value:
            _check(entry, arguments[0], name)
    elif origin is dict:
        _require(isinstance(value, dict), value, name)
        for key, entry in value.items():
            _check(key, arguments[0], name)
            _check(entry, arguments[1], f"{name}.{key}")
    elif kind is float:
        _require(type(value) in (int, float) and math.isfinite(value), value, name)
    elif kind is Path:
        _require(isinstance(value, Path), value, name)
    else:
        _require(type(value) is kind, value, name)


def _require(allowed: bool, value: Any, name: str) -> None:
    if not allowed:
        raise ValueError(f"{name} is {str(value)[:60]!r}")
