"""Quantized values of the twin: centred integer codes in float arithmetic, with their scale and zero_point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

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
        value: Tensor = _Scale.apply(self.codes, self.scale)
        return value

    def with_codes(self, codes: Tensor) -> QTensor:
        """The same qparams with other codes."""
        return replace(self, codes=codes)

    def fitted(self, codes: Tensor) -> QTensor:
        """The same qparams with codes that are rounded and clamped first.

        Inside the range the gradient is straight through; at the ends it goes to the zero_point, which moves the end.
        """
        return replace(self, codes=_Fit.apply(codes, self.zero_point, self.limits()))

    def limits(self, relu: bool = False) -> Limits:
        """What rounds and clamps codes of these qparams."""
        return Limits.of(self.zero_point, self.low, self.high, self.rounding, relu)

    def requantized(self, like: QTensor) -> QTensor:
        """The same values on the qparams of another tensor, as torch.cat does."""
        return like.fitted(self.codes * (self.scale / like.scale))


def straight_through_round(value: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing happened (Bengio et al. 2013)."""
    return value + (torch.round(value) - value).detach() if value.requires_grad else torch.round(value)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b), in one pass where the memory allows it."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    layout = torch.channels_last
    if a.dim() == 4 and a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
        return torch.dot(a.permute(0, 2, 3, 1).reshape(-1), b.permute(0, 2, 3, 1).reshape(-1))
    return (a * b).sum()


class _Fit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
        ctx.save_for_backward(centred)
        ctx.limits = limits
        return limits.fit(centred)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        (centred,) = ctx.saved_tensors
        passed = ctx.limits.inside(gradient, centred)
        return passed, ctx.limits.ends(gradient, centred, passed.sum()) if ctx.needs_input_grad[1] else None, None


class _Scale(torch.autograd.Function):
    """value = codes * scale."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        d_scale = dot(gradient, codes) if ctx.needs_input_grad[1] else None
        return gradient * scale if ctx.needs_input_grad[0] else None, d_scale


class Apart(torch.autograd.Function):
    """sum(w (a s_a - b s_b)^2), a scalar. Arguments: a, s_a (), b, s_b (), w; only the first two get a gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, weight: Tensor) -> Tensor:
        apart = torch.addcmul(a, b, b_scale / a_scale, value=-1)
        weighted = apart * weight
        ctx.save_for_backward(weighted, a, a_scale)
        return dot(apart, weighted) * a_scale.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weighted, a, scale = ctx.saved_tensors
        twice = 2 * gradients[0] * scale
        d_scale = dot(weighted, a) * twice if ctx.needs_input_grad[1] else None
        return weighted * (twice * scale) if ctx.needs_input_grad[0] else None, d_scale, None, None, None


def real(value: Any) -> Tensor | None:
    """The real numbers of a quantized tensor, of one of the twin, or of a floating one, as a copy; None of others."""
    if isinstance(value, QTensor):
        return value.dequantize()
    if isinstance(value, Tensor) and value.is_quantized:
        return value.dequantize()
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def from_kernel(value: Any, device: torch.device | str = "cpu") -> Any:
    """A tensor that kernels computed, quantized or not, as a value of the twin; anything else as it is."""
    if isinstance(value, Tensor) and value.is_quantized:
        zero_point = torch.tensor(float(value.q_zero_point()), device=device)
        low, high = (0, 255) if value.dtype == torch.quint8 else (-128, 127)
        codes = value.int_repr().to(device).float() - zero_point
        return QTensor(codes, torch.tensor(value.q_scale(), device=device).float(), zero_point, low, high, "round")
    return value.to(device) if isinstance(value, Tensor) else value


def to_kernel(value: Any) -> Any:
    """A value of the twin as the tensor that kernels take, on the CPU; anything else as it is."""
    if not isinstance(value, QTensor):
        return value.detach().cpu() if isinstance(value, Tensor) else value
    zero_point = int(value.zero_point.detach().round())
    codes = (value.codes.detach().round() + zero_point).clamp(value.low, value.high)
    kind = torch.uint8 if value.low >= 0 else torch.int8
    return torch._make_per_tensor_quantized_tensor(codes.cpu().to(kind), float(value.scale.detach()), zero_point)
