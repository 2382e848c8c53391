"""Biases that are packed with weights: what a layer was given, and what was added to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cptv_ao.backends.scale_slots import WeightSlot

#: The bias that a layer was given, (C,) or None, and what was added.
Corrected = tuple[Tensor | None, Tensor]


class CorrectedBiases:
    """By the name of the weight that they are packed with.

    Args:
        slots: of the weights.
    """

    def __init__(self, slots: Mapping[str, WeightSlot]) -> None:
        self._slots = slots
        self._corrected: dict[str, Corrected | None] = {}

    def given(self, name: str) -> Tensor | None:
        """The bias of a layer less its correction, in float, (C,); None where it has none."""
        corrected = self._corrected.get(name)
        return self._slots[name].bias() if corrected is None else corrected[0]

    def correction(self, name: str) -> Tensor | None:
        """What was added to a bias; None where nothing was."""
        corrected = self._corrected.get(name)
        return None if corrected is None else corrected[1]

    def correct(self, name: str, correction: Tensor | None) -> Tensor | None:
        """The bias that a layer is to have with this correction; None where it is the one that is there."""
        before = self.correction(name)
        if correction is None and before is None:
            return None
        given = self.given(name)
        self._corrected[name] = None if correction is None else (given, correction)
        added = torch.zeros_like(before) if correction is None and before is not None else correction
        return added if given is None or added is None else given + added

    def state(self, name: str) -> Corrected | None:
        """What is known of a bias, for `restore`; None where nothing was added."""
        return self._corrected.get(name)

    def restore(self, name: str, state: Corrected | None) -> None:
        """Know what `state` returned."""
        self._corrected[name] = state
