"""The places of a model that hold a tensor, and tensors of one's own in the place of those that were given.

A tensor that a model was given with may be somebody else's, too: the float model's, another conversion's, one that
inference mode made and nobody may write. So no such tensor is ever written: a copy takes its place first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cptv_ao.fx.paths import fetch


@dataclass(frozen=True)
class TensorSlot:
    """A place that holds a tensor: a parameter, buffer or attribute of a module."""

    owner: nn.Module
    name: str

    @staticmethod
    def of(model: nn.Module, path: str) -> TensorSlot:
        """The one at a path."""
        owner, _, name = path.rpartition(".")
        return TensorSlot(fetch(model, owner) if owner else model, name)

    @property
    def tensor(self) -> Tensor:
        """What it holds now."""
        return cast(Tensor, getattr(self.owner, self.name))

    def put(self, value: Tensor) -> None:
        """Let it hold this very tensor; in the place of a parameter, one that is wrapped as a parameter like that."""
        held: Any = self.owner._parameters
        if self.name in held:
            if not isinstance(value, nn.Parameter):
                value = value.clone() if value.is_inference() else value
                value = nn.Parameter(value, requires_grad=value.is_floating_point() and held[self.name].requires_grad)
        else:
            held = self.owner._buffers if self.name in self.owner._buffers else vars(self.owner)
        held[self.name] = value

    def copied(self) -> Tensor:
        """A copy that shares no memory, and that can be written wherever it was made; as contiguous as numbers are."""
        return self.tensor.detach().clone(memory_format=torch.contiguous_format)


class OwnTensors:
    """Tensors of one's own in slots, and those that were there.

    Args:
        slots: whose tensors are to be written.
    """

    def __init__(self, slots: Iterable[TensorSlot]) -> None:
        self._slots, self._given = list(dict.fromkeys(slots)), dict[TensorSlot, Tensor]()

    def take(self) -> None:
        """Put copies there."""
        for slot in self._slots:
            self._given[slot] = slot.tensor
            slot.put(slot.copied())

    def give_back(self) -> None:
        """Put back the very tensors that were there: of what they hold nothing was written."""
        for slot, given in self._given.items():
            slot.put(given)

    def settle(self) -> None:
        """Put back those that hold what is there now."""
        for slot, given in self._given.items():
            if torch.equal(slot.tensor, given):
                slot.put(given)
