"""Biases that are packed with weights: what a layer was given, and what was added to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.scale_slots import WeightSlot

#: The bias that a layer was given, (C,) or None, and what was added.
Corrected = tuple[Tensor | None, Tensor]
# Where a model's `meta` says which of its biases are corrected, by the name of the weight.
_META_KEY = "cptv_ao.biases"


class CorrectedBiases:
    """By the name of the weight that they are packed with.

    Args:
        model: that holds them. What `remember` left with it is known, where it still makes the biases that are there.
        slots: of the weights.
    """

    def __init__(self, model: GraphModule, slots: Mapping[str, WeightSlot]) -> None:
        self._slots, self._model = slots, model
        self._corrected: dict[str, Corrected | None] = {}
        known = model.meta.get(_META_KEY)
        self.know(known if isinstance(known, dict) else {})

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

    def take_as_given(self) -> Mapping[str, Corrected | None]:
        """Let what was added be a part of what the layers were given, for these biases are rewritten now.

        Returns:
            What was known, for `know`.
        """
        known, self._corrected = self._corrected, {}
        return known

    def know(self, known: Mapping[str, Any]) -> None:
        """Know what was added, where that makes the biases that are there."""
        self._corrected = {
            name: found
            for name, found in known.items()
            if name in self._slots and _makes(self._slots[name].bias(), found)
        }

    def remember(self) -> None:
        """Leave what was added with the model: another refine, or a diagnosis, knows the float network by it."""
        known = {name: found for name, found in self._corrected.items() if found is not None}
        if known or _META_KEY in self._model.meta:
            self._model.meta[_META_KEY] = known


def _makes(bias: Tensor | None, found: Any) -> bool:
    """Whether a bias is what was found in a `meta` or a file, where anybody may write."""
    match found:
        case (None, Tensor() as added):
            whole = added
        case (Tensor() as given, Tensor() as added) if given.shape == added.shape:
            whole = given + added
        case _:
            return False
    return bias is not None and torch.equal(whole.to(bias), bias)
