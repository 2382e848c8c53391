"""The inputs of one forward call, and parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.nested import Path, leaves, mapped
from cptv_ao.core.tensors import moved


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward call: positional tensors, or keyword inputs.

    `fixed`: cannot be cut (a graph that was exported without a dynamic batch, rows that depend on each other).
    `shared`: inputs that are the same for all images, though they may have as many rows as there are images.
    `per_image`: rows of the model's output for each image.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: int
    fixed: bool = False
    shared: frozenset[Path] = frozenset()
    per_image: int = 1

    def rows(self, start: int, stop: int) -> Batch:
        """The images start..stop of this batch."""

        def cut(path: Path, value: Any) -> Any:
            each = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.images
            return value[start:stop] if each and path not in self.shared else value

        return replace(self, args=mapped(self.args, cut), kwargs=mapped(self.kwargs, cut), images=stop - start)

    def few(self, count: int) -> Batch:
        """At most so many images, or all of them where the number is fixed."""
        return self if self.fixed else self.rows(0, min(count, self.images))

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        return replace(self, args=moved(self.args, device), kwargs=moved(self.kwargs, device))

    def parts(self, count: int) -> list[tuple[Batch, slice]]:
        """About so many parts of equal size, each with its rows of the output; one part where it cannot be cut."""
        count = 1 if self.fixed else min(self.images, max(1, count))
        if count == 1:
            return [(self, slice(None))]
        ends = pairwise(self.images * i // count for i in range(count + 1))
        return [(self.rows(i, j), slice(i * self.per_image, j * self.per_image)) for i, j in ends]

    @cached_property
    def tensors(self) -> dict[Path, Tensor]:
        """All that are among the inputs, by where they stand."""
        return {path: value for path, value in self.leaves if isinstance(value, Tensor)}

    def holding(self, tensors: Mapping[Path, Tensor]) -> Batch:
        """With others in the place of some of its tensors."""

        def changed(path: Path, value: Any) -> Any:
            return tensors.get(path, value)

        return replace(self, args=mapped(self.args, changed), kwargs=mapped(self.kwargs, changed))

    @property
    def leaves(self) -> list[tuple[Path, Any]]:
        """All inputs, by where they stand."""
        return [*leaves(self.args), *leaves(self.kwargs)]

    @property
    def sizes(self) -> dict[Path, int]:
        """How many rows each of its tensors has; without those that have none, being numbers."""
        return {path: tensor.shape[0] for path, tensor in self.tensors.items() if tensor.dim()}

    @property
    def bytes(self) -> int:
        """What its tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
