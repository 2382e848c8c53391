"""What a model takes of what a loader gives.

image, (image, label), {"image": image, "label": label}     a model of one input
(a, b), (a, b, label), ((a, b), label), ({"a": a, "b": b}, label)      a model of the inputs a and b
{"a": a, "b": b}, ({"a": a, "b": b}, label)                 a model of one input that is a dict of a and b
(a, b), (a, b, label), ((a, b), label)                      a model of one input that is a tuple of a and b
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cptv_ao.core.errors import CalibrationDataError
from cptv_ao.core.nested import Path


def _any(keyword: str) -> bool:
    return True


@dataclass(frozen=True)
class Intake:
    """The inputs of one model.

    Attributes:
        takes: whether it has an input of this name: dicts may hold others (labels, names of files), which are left.
        required: names of the positional inputs that it cannot do without, in order: with two or more of them a tuple
            holds as many inputs, else its first item alone is one.
        optional: names of those that a caller may leave out.
        shapes: that a graph was exported for, by where an input stands; None in the place of a number that is free.
        nested: inputs that are known to be dicts (0) or tuples of so many tensors, by name.
        plain: names of those that are known to be neither.
    """

    takes: Callable[[str], bool] = _any
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    shapes: Mapping[Path, tuple[int | None, ...]] = field(default_factory=dict)
    nested: Mapping[str, int] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()

    @property
    def fixed(self) -> bool:
        """Whether it takes one number of images alone."""
        return bool(self.shapes) and all(shape[0] is not None for shape in self.shapes.values())

    def inputs(self, item: Any, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword inputs among an item of a loader.

        Raises:
            CalibrationDataError: it holds too few, or cannot be told apart from labels.
        """
        if isinstance(item, Mapping) and item:
            return self._mapped(item, index)
        listed = isinstance(item, (list, tuple)) and len(item) > 0
        first = item[0] if listed else item
        if len(self.required) < 2:
            parts = self.nested.get(self.required[0], 0) if self.required else 0
            if listed and isinstance(first, Mapping) and self._alone_a_dict(first):
                return (first,), {}
            whole = listed and isinstance(first, Tensor) and 0 < parts <= len(item)
            return (tuple(item[:parts]) if whole else first,), {}
        if listed and isinstance(first, Mapping) and self.required[0] not in self.nested:
            return (), self._keywords(first, index)
        return self._positional(item if listed else (item,), index), {}

    def _mapped(self, item: Mapping[str, Any], index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A dict of the inputs, or one that is the only input itself."""
        return ((item,), {}) if self._alone_a_dict(item) else ((), self._keywords(item, index))

    def _alone_a_dict(self, item: Mapping[str, Any]) -> bool:
        alone = len(self.required) == 1 and self.nested.get(self.required[0]) == 0
        return alone and not any(isinstance(key, str) and self.takes(key) for key in item)

    def _keywords(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        taken = {key: value for key, value in item.items() if not isinstance(key, str) or self.takes(key)}
        if not taken:
            raise CalibrationDataError(
                f"calib_loader, batch {index}: expected a dict of the model's inputs, got none of them among "
                f"{sorted(map(str, item))}",
                index,
            )
        return taken

    def _positional(self, item: Any, index: int) -> tuple[Any, ...]:
        count, names = len(self.required), ", ".join(self.required)
        where = f"calib_loader, batch {index}: expected the {count} inputs of the model ({names})"
        keys = ", ".join(f"{name!r}: ..." for name in self.required)
        if len(item) < count and not (isinstance(item[0], (list, tuple)) and len(item[0]) >= count):
            raise CalibrationDataError(
                f"{where}, got {len(item)} of them; give tuples ({names}), or dicts {{{keys}}}", index
            )
        nested = isinstance(item[0], (list, tuple)) and len(item[0]) >= count
        if nested and self.required[0] in self.plain:  # which it cannot be: they are all of them
            return tuple(item[0][:count])
        nested = nested and self.required[0] not in self.nested
        if nested or (self.optional and len(item) > count):
            doubt = (
                f"whose first item holds {len(item[0])} values: it may be all inputs, or the first one"
                if nested
                else f"whose item {count} may be the input {self.optional[0]}, or a label"
            )
            raise CalibrationDataError(f"{where}, got a {type(item).__name__} {doubt}; give dicts {{{keys}}}", index)
        return tuple(item[:count])


#: of a model of which nothing is known
ANY = Intake()
