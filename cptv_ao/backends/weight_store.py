"""The quantized weights of a model, by site: what their codes are rounded from, and the biases packed with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cptv_ao.backends.scale_slots import WeightSlot
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import SiteTable
from cptv_ao.core.weight_rounding import round_weight, shift_of


class WeightState(NamedTuple):
    """What is held for a weight at one time.

    Attributes:
        slot: as its `WeightSlot` gave it.
        corrected: the bias that its layer was given, and what was added to it; None where nothing was.
    """

    slot: Any
    shift: Tensor | None
    corrected: tuple[Tensor | None, Tensor] | None
    float_weight: Tensor | None


class WeightStore:
    """Reads and writes the weights of one model.

    Args:
        slots: of the weights, by the name of their site.
        sites: of the model; what they move with is not looked at.

    Attributes:
        floats: float weights given so far, from which codes are re-rounded.
    """

    def __init__(self, slots: Mapping[str, WeightSlot], sites: SiteTable) -> None:
        self._slots, self._sites = slots, sites
        self.floats: dict[str, Tensor] = {}
        self._shifts: dict[str, Tensor | None] = {}
        # By weight whose layer has a corrected bias: the bias that it was given, and what was added.
        self._corrected: dict[str, tuple[Tensor | None, Tensor] | None] = {}
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

    def bias(self, name: str) -> Tensor | None:
        """What is added to the products with a weight, in float, less a correction; (C,)."""
        corrected = self._corrected.get(name)
        return self.slot(name).bias() if corrected is None else corrected[0]

    def shiftable(self, name: str) -> bool:
        """Whether a weight may have other codes than the nearest: not where the graph rounds a float weight itself."""
        return self.slot(name).float_weight is None

    def read(self, name: str) -> QParams:
        """As `Backend.read`."""
        corrected = self._corrected.get(name)
        correction = None if corrected is None else corrected[1]
        return replace(self._slots[name].read(), shift=self._shifts.get(name), correction=correction)

    def write(self, name: str, qparams: QParams) -> None:
        """As `Backend.write`; `qparams` are checked.

        Raises:
            KeyError: there is no float weight.
        """
        site = self._sites[name]
        codes = round_weight(self.floats[name], qparams, site)
        self._slots[name].write_weight(codes, site, qparams, self._correct(name, qparams.correction))
        self._shifts[name] = qparams.shift

    def write_codes(self, name: str, qparams: QParams, codes: Tensor, bias: Tensor | None) -> None:
        """Write these codes (int8), which are not rounded, with their scales; a bias if given."""
        self._slots[name].write_weight(codes, self._sites[name], qparams, bias)

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

    def scale_channels(self, name: str, factor: Tensor, bias: Tensor) -> None:
        """Multiply what a layer gives, channel by channel, and give it another bias.

        Args:
            name: of its weight, whose scales are per channel of the output.
            factor: (C,); where it is negative, codes change their sign (-128 becomes 127), where it is 0, they are 0.
            bias: (C,), the whole new one.
        """
        codes, given = self.tensor(name).int_repr(), self.read(name)
        shape = (-1, *[1] * (codes.dim() - 1))
        scale = given.scale * torch.where(factor == 0, 1.0, factor.abs().double())
        qparams = replace(given, scale=scale).checked(self._sites[name])
        turned = codes.short() * factor.sign().short().reshape(shape)
        self.write_codes(name, qparams, turned.clamp(-128, 127).to(torch.int8), bias)
        if name in self.floats:
            self.set_float(name, self.floats[name] * factor.reshape(shape))

    def renew(self, names: Iterable[str]) -> None:
        """Let kernels forget what they remember of these weights' layers."""
        for name in set(names):
            self._slots[name].renew()

    def state(self, name: str) -> WeightState:
        """What is held for a weight now, for `restore`."""
        beside = self._shifts.get(name), self._corrected.get(name), self.floats.get(name)
        return WeightState(self._slots[name].state(), *beside)

    def restore(self, name: str, state: WeightState) -> None:
        """Put back what `state` returned."""
        self._shifts[name], self._corrected[name] = state.shift, state.corrected
        if state.float_weight is not None:
            self.floats[name] = state.float_weight
        self._slots[name].restore(state.slot)

    def _correct(self, name: str, correction: Tensor | None) -> Tensor | None:
        """The bias of a layer with this correction; None where it is the one that is there."""
        corrected = self._corrected.get(name)
        if correction is None and corrected is None:
            return None
        given = self.bias(name)
        self._corrected[name] = None if correction is None else (given, correction)
        added = torch.zeros_like(corrected[1]) if correction is None and corrected is not None else correction
        return added if given is None or added is None else given + added
