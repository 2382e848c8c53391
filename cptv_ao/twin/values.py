"""Quantized values of the twin: centred integer codes in float arithmetic, with their scale and zero_point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

#: `round`: what the kernels compute (straight-through gradients). `clamp`: no rounding, but the code range holds.
#: `none`: neither; the network in float.
Rounding = Literal["round", "clamp", "none"]


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor: `codes` are centred (code - zero_point), whole float32 numbers; the value is codes * scale.

    `low`, `high`: range of the uncentred codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    rounding: Rounding

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def with_codes(self, codes: Tensor) -> QTensor:
        """The same qparams with other codes."""
        return replace(self, codes=codes)

    def fitted(self, codes: Tensor) -> QTensor:
        """The same qparams with codes that are rounded and clamped first."""
        return replace(self, codes=fit(codes, self.zero_point, self.low, self.high, self.rounding))

    def requantized(self, like: QTensor) -> QTensor:
        """The same values on the qparams of another tensor, as torch.cat does."""
        return like.fitted(self.codes * (self.scale / like.scale))


def straight_through_round(value: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing happened (Bengio et al. 2013)."""
    return value + (torch.round(value) - value).detach() if value.requires_grad else torch.round(value)


def fit(centred: Tensor, zero_point: Tensor, low: int, high: int, rounding: Rounding) -> Tensor:
    """Round centred codes and clamp them so that code + zero_point is in low..high.

    Inside the range the gradient is straight through; at the ends it goes to the zero_point, which moves the end.
    """
    if rounding == "none":
        return centred
    if rounding == "round":
        centred = straight_through_round(centred)
    return torch.minimum(torch.maximum(centred, low - zero_point), high - zero_point)
