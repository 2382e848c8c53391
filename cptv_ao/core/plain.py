"""Dataclasses as dicts, lists and numbers, and back: for where our own types may not go, and for what files claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def as_plain(value: Any, *, finite: bool = False) -> Any:
    """A value as dicts, lists, strings, numbers, booleans and None, and no subclass of these; enums by their names.

    Args:
        finite: for strict JSON: numbers that are not finite become None.

    Raises:
        TypeError: there is something else in it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.name
    if finite and isinstance(value, float) and not math.isfinite(value):
        return None
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    held = partial(as_plain, finite=finite)
    if isinstance(value, Mapping):
        return {held(key): held(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [held(one) for one in value]
    if is_dataclass(value):
        return {field.name: held(getattr(value, field.name)) for field in fields(value)}
    raise TypeError(f"expected a plain value, got {type(value).__name__}")


def from_plain(kind: type[T], value: Any) -> T:
    """The dataclass that `as_plain` took apart.

    Raises:
        KeyError, TypeError, ValueError: the value is not what `as_plain` makes of one.
    """
    made: T = _made(kind, value)
    return made


def _made(kind: Any, value: Any) -> Any:
    arguments, origin = get_args(kind), get_origin(kind) or kind
    if isinstance(kind, UnionType):
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _made(other, value)
    if is_dataclass(kind):
        return _dataclass(kind, value)
    if issubclass(origin, Enum):
        return origin[value]
    if origin is tuple or origin is list:
        held = _expected(list, value)
        kinds = arguments[:1] * len(held) if origin is list or arguments[1:] == (Ellipsis,) else arguments
        return origin(_made(one, part) for one, part in zip(kinds, held, strict=True))
    if origin is dict:
        return {_made(arguments[0], k): _made(arguments[1], v) for k, v in _expected(dict, value).items()}
    return value if kind is float and type(value) is int else _expected(kind, value)


def _dataclass(kind: Any, value: Any) -> Any:
    hints, held = get_type_hints(kind), _expected(dict, value)
    if held.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"expected the parts of a {kind.__name__}, got {sorted(map(str, held))}")
    return kind(**{name: _made(hints[name], part) for name, part in held.items()})


def _expected(kind: Any, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
