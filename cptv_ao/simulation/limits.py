"""The codes that values may have: how they are rounded, where they are clipped, and what passes back through that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

#: `round`: what the kernels compute (straight-through gradients). `clamp`: no rounding, but the code range holds.
#: `none`: neither; the network in float.
Rounding = Literal["round", "clamp", "none"]


@dataclass(frozen=True, eq=False)
class Limits:
    """Rounds centred codes and clamps them so that code + zero_point is in low..high (with `relu`: from 0 up).

    The ends are python numbers on a CPU, where clamping to them is several times faster than to tensors.
    """

    low: float | Tensor
    high: float | Tensor
    rounds: bool
    relu: bool = False

    @staticmethod
    def of(zero_point: Tensor, low: int, high: int, rounding: Rounding, relu: bool = False) -> Limits:
        """Limits of centred codes."""
        if rounding == "none":
            return Limits(0.0 if relu else -math.inf, math.inf, False, relu)
        if zero_point.dim() == 0 and zero_point.is_cpu and not torch.compiler.is_compiling():
            zero = float(zero_point.detach())
            return Limits(max(low - zero, 0.0) if relu else low - zero, high - zero, rounding == "round", relu)
        zero_point = zero_point.detach()
        floor = low - zero_point
        return Limits(floor.clamp_min(0.0) if relu else floor, high - zero_point, rounding == "round", relu)

    def within(self, low: Tensor, high: Tensor) -> Limits:
        """These limits and those of two more ends (), which are rounded where codes are."""
        low, high = (torch.round(end) if self.rounds else end for end in (low.detach(), high.detach()))
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            floor, ceiling = (torch.as_tensor(end, device=low.device) for end in (self.low, self.high))
            return replace(self, low=torch.clamp(low, floor, ceiling), high=torch.clamp(high, floor, ceiling))
        lower, upper = (min(max(float(end), self.low), self.high) for end in (low, high))
        return replace(self, low=lower, high=upper)

    def numbers(self, u: Tensor) -> Tensor:
        """Values in units of the scale, with 0 / 0 beyond the upper end, where the kernels' codes of that are; in place
        if they are clipped at all."""
        if not isinstance(self.high, Tensor) and self.high == math.inf:
            return u
        return u.nan_to_num_(nan=torch.finfo(u.dtype).max)

    def fit(self, u: Tensor) -> Tensor:
        """The codes."""
        codes = torch.round(u) if self.rounds else u.clone()
        return codes.clamp_(self.low, self.high)  # type: ignore[arg-type]

    def inside(self, gradient: Tensor, u: Tensor) -> Tensor:
        """The gradient where codes are not clipped, 0 elsewhere; a new tensor."""
        margin = 0.5 if self.rounds else 0.0
        return _between(gradient, u, self.low if self.relu else self.low - margin, self.high + margin)

    def ends(self, gradient: Tensor, u: Tensor, passed_sum: Tensor) -> Tensor:
        """The gradient of a zero_point (): it moves the ends that codes are clipped to.

        `passed_sum`: the sum of what `inside` returned.
        """
        if self.relu:  # the lower end is zero, wherever the zero_point is
            passed_sum = _between(gradient, u, -math.inf, self.high + (0.5 if self.rounds else 0.0)).sum()
        return passed_sum - gradient.sum()


def _between(gradient: Tensor, u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(high, Tensor) or isinstance(low, Tensor):
        return torch.where((u > low) & (u < high), gradient, 0.0)
    passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, u, low, high)
    return passed
