"""quantized.mul and add of a value and a number: their output has the scale of the input, times or moved by it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.qtensor import QTensor, straight_through_round


class ScaledBy(OutOfPlace):
    """quantized.mul of a value and a number, and its fused ReLU: the codes stay, the scale is multiplied."""

    def __init__(self, factor: float, relu: bool) -> None:
        super().__init__()
        self._factor, self._relu = factor, relu

    def forward(self, value: QTensor) -> QTensor:
        factor = self._factor
        if factor == 0:
            return replace(value, codes=0 * value.codes, scale=torch.ones_like(value.scale), zero_point=0 * value.scale)
        if factor < 0:  # the codes are mirrored in their range
            mirrored = value.low + value.high - value.zero_point
            value = replace(value, codes=-value.codes, scale=value.scale * -factor, zero_point=mirrored)
        else:
            value = replace(value, scale=value.scale * factor)
        return value.with_codes(functional.relu(value.codes)) if self._relu else value


class ShiftedBy(OutOfPlace):
    """quantized.add of a value and a number, and its fused ReLU: the zero_point moves by whole steps.

    Where it would leave the range of the codes, the scale grows so that it stays at the end of it.
    """

    def __init__(self, number: float, relu: bool) -> None:
        super().__init__()
        self._number, self._relu = number, relu

    def forward(self, value: QTensor) -> QTensor:
        if value.rounding == "none":
            codes = value.codes + self._number / value.scale
            return value.with_codes(functional.relu(codes) if self._relu else codes)
        steps = straight_through_round(self._number / value.scale.double()).float()
        moved = value.zero_point - steps.detach()
        ends = moved.detach().clamp(value.low, value.high)
        codes = value.codes + steps
        shifted = replace(value, codes=codes, zero_point=moved)
        if not torch.equal(ends, moved.detach()):
            shifted = _on_larger_scale(value, codes, moved.detach(), ends)
        return shifted.with_codes(functional.relu(shifted.codes)) if self._relu else shifted


def _on_larger_scale(value: QTensor, codes: Tensor, moved: Tensor, end: Tensor) -> QTensor:
    far = value.high - moved if float(end) == value.low else moved - value.low
    ratio = far / (value.high - value.low)
    return replace(value, scale=value.scale * ratio, zero_point=end).fitted(codes / ratio)
