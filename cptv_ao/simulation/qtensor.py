"""Quantized values of the twin: centred integer codes in float arithmetic, with their scale and zero_point."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.qparams import PER_CHANNEL
from cptv_ao.simulation import fused
from cptv_ao.simulation.limits import Limits, Rounding


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


# No rounding, and no ends.
_EVERYWHERE = Limits(-math.inf, math.inf, False)


def _one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)


class _Fit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centred: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
        ctx.save_for_backward(centred)
        ctx.limits, ctx.fused = limits, fused.takes(centred)
        return fused.fit(centred, _one(centred), None, limits) if ctx.fused else limits.fit(centred)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        (centred,) = ctx.saved_tensors
        if ctx.fused:
            passed, sums = fused.pull(gradient, centred, _one(centred), None, ctx.limits)
            return passed, sums[2], None
        passed = ctx.limits.inside(gradient, centred)
        return passed, ctx.limits.ends(gradient, centred, passed.sum()) if ctx.needs_input_grad[1] else None, None


class _Scale(torch.autograd.Function):
    """value = codes * scale."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.fused = fused.takes(codes)
        return fused.fit(codes, scale, None, _EVERYWHERE) if ctx.fused else codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        if ctx.fused:
            passed, sums = fused.pull(gradient, codes, scale, None, _EVERYWHERE, factor=scale)
            return passed, sums[1] / scale
        d_scale = dot(gradient, codes)
        if gradient.is_cpu and not bool(d_scale.isfinite()):  # from 0 / 0, say, nothing is to be learnt
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
            d_scale = dot(gradient, codes)
        return gradient * scale if ctx.needs_input_grad[0] else None, d_scale


class Apart(torch.autograd.Function):
    """sum(w (a s_a - b s_b)^2), a scalar. Arguments: a, s_a (), b (of any floating dtype), s_b (), w; only the first
    two get a gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, weight: Tensor) -> Tensor:
        ratio, channels = b_scale / a_scale, weight.flatten()
        ctx.fused = fused.takes(a) and a.is_contiguous() and b.is_contiguous()
        ctx.fused = ctx.fused and len(channels) == weight.shape[-1] == a.shape[-1]
        if ctx.fused:
            ctx.save_for_backward(a, a_scale, b, channels, ratio)
            return fused.apart(a, b, channels, ratio) * a_scale.square()
        apart = torch.addcmul(a, b.float(), ratio, value=-1)
        weighted = apart * weight
        ctx.save_for_backward(weighted, a, a_scale)
        return dot(apart, weighted) * a_scale.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:
            a, scale, b, channels, ratio = ctx.saved_tensors
            twice = 2 * gradients[0] * scale
            pulled, moment = fused.pull_apart(a, b, channels, ratio, twice * scale)
            return pulled, moment * twice, None, None, None
        weighted, a, scale = ctx.saved_tensors
        twice = 2 * gradients[0] * scale
        d_scale = dot(weighted, a) * twice if ctx.needs_input_grad[1] else None
        return weighted * (twice * scale) if ctx.needs_input_grad[0] else None, d_scale, None, None, None


def dequantize(value: Any) -> Any:
    """The real numbers of one of the twin's tensors; anything else as it is."""
    return value.dequantize() if isinstance(value, QTensor) else value


def real(value: Any) -> Tensor | None:
    """The real numbers of a quantized tensor, of one of the twin, or of a floating one, as a copy; None of others."""
    if isinstance(value, QTensor):
        return value.dequantize()
    if isinstance(value, Tensor) and value.is_quantized:
        return value.dequantize()
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else None


def from_kernel(value: Any, device: torch.device | str = "cpu") -> Any:
    """A tensor that kernels computed, quantized or not, as a value of the twin; anything else as it is."""
    if isinstance(value, Tensor) and value.is_quantized and value.qscheme() in PER_CHANNEL:
        return value.dequantize().to(device)  # a weight that was not lowered: its layer computes in float
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
