"""The quantized weights of a model, by site: what their codes are rounded from, and the biases packed with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.corrected_biases import Corrected, CorrectedBiases
from cptv_ao.backends.scale_slots import WeightSlot
from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.core.sites import SiteTable
from cptv_ao.core.weight_rounding import round_weight, shift_of


class WeightState(NamedTuple):
    """What is held for a weight at one time.

    Attributes:
        slot: as its `WeightSlot` gave it.
        corrected: see `CorrectedBiases.state`.
    """

    slot: Any
    shift: Tensor | None
    corrected: Corrected | None
    float_weight: Tensor | None


class WeightStore:
    """Reads and writes the weights of one model.

    Args:
        model: that holds them.
        slots: of the weights, by the name of their site.
        sites: of the model; what they move with is not looked at.
        remembered: the activations whose scales kernels remember with a weight, each with the weight.

    Attributes:
        floats: float weights given so far, from which codes are re-rounded.
        biases: what is added to the products with weights, as it was given and corrected.
        trained: scales on which these were rounded while they were trained, where they were (QAT).
    """

    def __init__(
        self,
        model: GraphModule,
        slots: Mapping[str, WeightSlot],
        sites: SiteTable,
        remembered: Iterable[tuple[str, str]],
    ) -> None:
        self._slots, self._sites, self._remembered = slots, sites, list(remembered)
        self.floats: dict[str, Tensor] = {}
        self.trained: Assignment = {}
        self._shifts: dict[str, Tensor | None] = {}
        self.biases = CorrectedBiases(model, slots)
        for name, slot in slots.items():
            if slot.float_weight is not None:
                self.set_float(name, slot.float_weight)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def slot(self, name: str) -> WeightSlot:
        """Where a weight is held.

        Raises:
            KeyError: it is no weight.
        """
        if name not in self._slots:
            raise KeyError(f"{name} is an activation site, not a weight")
        return self._slots[name]

    def tensor(self, name: str) -> Tensor:
        """The weight as a quantized tensor."""
        return self.slot(name).weight()

    def shiftable(self, name: str) -> bool:
        """Whether a weight may have other codes than the nearest: not where the graph rounds a float weight itself."""
        return self.slot(name).float_weight is None

    def read(self, name: str) -> QParams:
        """As `Backend.read`."""
        shift, correction = self._shifts.get(name), self.biases.correction(name)
        return replace(self._slots[name].read(), shift=shift, correction=correction)

    def write(self, name: str, qparams: QParams) -> None:
        """As `Backend.write`; `qparams` are checked.

        Raises:
            KeyError: there is no float weight.
        """
        site = self._sites[name]
        codes = round_weight(self.floats[name], qparams, site)
        self._slots[name].write_weight(codes, site, qparams, self.biases.correct(name, qparams.correction))
        self._shifts[name] = qparams.shift

    def write_codes(self, name: str, qparams: QParams, codes: Tensor, bias: Tensor | None) -> None:
        """Write these codes, which are not rounded, with their scales; a bias if given."""
        self._slots[name].write_weight(codes, self._sites[name], qparams, bias)

    def hold(self, name: str, codes: Tensor) -> bool:
        """As `WeightSlot.hold`."""
        slot = self._slots[name]
        held = slot.hold(codes)
        if slot.float_weight is not None:
            self.set_float(name, slot.float_weight)
        return held

    def set_float(self, name: str, weight: Tensor) -> None:
        """Give the float weight from which codes are re-rounded.

        Where codes are not the nearest, since the model was refined before, they are what a re-rounding keeps.
        """
        quantized = self.tensor(name)
        # A functional conv1d is packed as a conv2d.
        given = weight.detach().to("cpu", torch.float32).reshape(quantized.shape).contiguous()
        self.floats[name] = given
        if self.shiftable(name):
            self._shifts[name] = shift_of(given, quantized.int_repr(), self._slots[name].read(), self._sites[name])

    def renew(self, name: str) -> None:
        """Let kernels forget another scale or zero_point of this activation, or what this weight was before."""
        for weight in {weight for activation, weight in self._remembered if name in (activation, weight)}:
            self._slots[weight].renew()

    def state(self, name: str) -> WeightState:
        """What is held for a weight now, for `restore`."""
        beside = self._shifts.get(name), self.biases.state(name), self.floats.get(name)
        return WeightState(self._slots[name].state(), *beside)

    def restore(self, name: str, state: WeightState) -> None:
        """Put back what `state` returned."""
        self._shifts[name] = state.shift
        self.biases.restore(name, state.corrected)
        if state.float_weight is not None:
            self.floats[name] = state.float_weight
        self._slots[name].restore(state.slot)
