"""Values in nested dicts, lists and tuples, by where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]
"""Where an input stands in a batch: its place or keyword, and those inside of nested lists and dicts."""


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """What stands in nested dicts, lists and tuples, with where it stands."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from leaves(part, (*path, index))
    else:
        yield path, value


def mapped(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same with each leaf changed; dicts of any kind become plain ones."""
    if isinstance(value, Mapping):
        return {key: mapped(part, change, (*path, key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [mapped(part, change, (*path, index)) for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(path, value)
