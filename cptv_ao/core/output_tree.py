"""The tensors of what a model returns, by name: whatever holds them, in the order in which they stand.

(logits, {"boxes": b, "masks": [m, n]})     0, 1.boxes, 1.masks.0, 1.masks.1
Out(logits=a, hidden=None)                  logits
a tensor                                    output
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

#: What a tensor is called that is all that a model returns.
WHOLE = "output"


def named_leaves(output: Any) -> dict[str, Any]:
    """What stands in nested dicts, lists, tuples, dataclasses and all that is registered as a pytree, by name.

    Names are keys, fields and indices, with dots between; where two are the same the later one is counted.
    """
    found: dict[str, Any] = {}
    for path, leaf in _leaves(output, ()):
        name = given = ".".join(path) or WHOLE
        count = 1
        while name in found:
            count += 1
            name = f"{given} ({count})"
        found[name] = leaf
    return found


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors among `named_leaves`."""
    return {name: leaf for name, leaf in named_leaves(output).items() if isinstance(leaf, Tensor)}


def children(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a value, by name; None where it is a leaf."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(index), part) for index, part in enumerate(value)]
    if isinstance(value, Tensor) or value is None:
        return None
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if type(value) in pytree.SUPPORTED_NODES:
        parts, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        return [(str(index), part) for index, part in enumerate(parts)]
    return None


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    parts = children(value)
    if parts is None:
        yield path, value
        return
    for name, part in parts:
        yield from _leaves(part, (*path, name))
