"""The quantized ops of the twin as autograd functions: kernel-exact codes forward, few passes backward.

Each takes and gives centred codes. `u` is the value in units of the output's scale before it is rounded; the
gradient with respect to it passes straight through the rounding, and stops where the codes are clipped. Gradients of
scales follow from sums of `gradient * u`, so that no other pass over an activation is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.twin.values import Limits, dot

_aten = torch.ops.aten


class Quantize(torch.autograd.Function):
    """codes = fit(value / scale). Arguments: value, scale (), zero_point (), limits."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
        inverse = 1 / scale
        u = value * inverse
        ctx.save_for_backward(u, inverse)
        ctx.limits = limits
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        u, inverse = ctx.saved_tensors
        passed = ctx.limits.inside(gradient, u)
        d_scale = -dot(passed, u) * inverse if ctx.needs_input_grad[1] else None
        d_zero = ctx.limits.ends(gradient, u, passed.sum()) if ctx.needs_input_grad[2] else None
        return passed.mul_(inverse) if ctx.needs_input_grad[0] else None, d_scale, d_zero, None


class RoundWeight(torch.autograd.Function):
    """codes = fit(weight / scale) along the channel axis. The weight itself gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shape: Sequence[int], limits: Limits) -> Tensor:
        u = weight / scale.reshape(shape)
        ctx.save_for_backward(u, scale)
        ctx.shape, ctx.limits = shape, limits
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        u, scale = ctx.saved_tensors
        product = ctx.limits.inside(gradient, u).mul_(u)
        kept = [d for d, size in enumerate(ctx.shape) if size != 1]
        dims = [d for d in range(u.dim()) if d not in kept]
        return None, -product.sum(dims).reshape(scale.shape) / scale, None, None


@dataclass(frozen=True)
class Linear:
    """accumulator = codes @ weight.T, channels last."""

    channel_dim: int = -1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(codes, weight)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        rows = gradient.reshape(-1, gradient.shape[-1])
        d_codes = (rows @ weight).reshape(codes.shape) if mask[0] else None
        return d_codes, rows.t() @ codes.reshape(-1, codes.shape[-1]) if mask[1] else None


@dataclass(frozen=True)
class Convolution:
    """accumulator = convolution of any rank, channels first; padding is zero, which is what zero_point stands for."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_dim: int = 1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        none = [0] * len(self.stride)
        settings = (self.stride, self.padding, self.dilation, False, none, self.groups)
        return torch.convolution(codes, weight, None, *settings)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        none = [0] * len(self.stride)
        settings = (self.stride, self.padding, self.dilation, False, none, self.groups)
        return _aten.convolution_backward(gradient, codes, weight, None, *settings, [*mask, False])[:2]


Product = Linear | Convolution


class Weigh(torch.autograd.Function):
    """u = (accumulator + bias / (s_x s_w)) * (s_x s_w / s_y), in this order of rounding.

    Arguments: codes, scale s_x (), weight codes, weight scale s_w () or (C,), bias (C,), output scale s_y (),
    zero_point (), product, whole_bias (QNNPACK rounds the bias to an accumulator), limits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_scale: Tensor,
        zero_point: Tensor,
        product: Product,
        whole_bias: bool,
        limits: Limits,
    ) -> Tensor:
        u = product.forward(codes, weight)
        shape = [1] * u.dim()
        shape[product.channel_dim] = -1
        unit = scale * weight_scale
        multiplier = unit / out_scale
        offset = None
        if bias is not None:
            offset = bias / unit
            if whole_bias and limits.rounds:
                offset = torch.round(offset)
            u.add_(offset.reshape(shape))
        u.mul_(multiplier.reshape(shape) if multiplier.dim() else multiplier)
        ctx.save_for_backward(codes, scale, weight, weight_scale, bias, out_scale, u, multiplier, offset)
        ctx.product, ctx.limits = product, limits
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale, weight, weight_scale, bias, out_scale, u, multiplier, offset = ctx.saved_tensors
        needs, product = ctx.needs_input_grad, ctx.product
        passed = ctx.limits.inside(gradient, u)
        dims = [d for d in range(u.dim()) if d != product.channel_dim % u.dim()]
        total = passed.sum(dims)
        per_weight = multiplier.reshape([-1] + [1] * (weight.dim() - 1))
        mask = (needs[0], needs[2])
        d_codes, d_weight = product.backward(passed, codes, weight * per_weight, mask)
        if d_weight is None:
            moment = (passed * u).sum(dims)
        else:  # sum(passed * u) from the weight's gradient: u is linear in the weight
            moment = (d_weight * weight).flatten(1).sum(1)
            moment = (moment if offset is None else moment + offset * total) * multiplier
            d_weight = d_weight * per_weight
        direct = moment if bias is None else moment - total * bias / out_scale
        d_weight_scale = direct / weight_scale if weight_scale.dim() else direct.sum() / weight_scale
        d_zero = ctx.limits.ends(gradient, u, total.sum()) if needs[6] else None
        d_out = -moment.sum() / out_scale
        return d_codes, direct.sum() / scale, d_weight, d_weight_scale, None, d_out, d_zero, None, None, None


class Add(torch.autograd.Function):
    """u = (a s_a + b s_b) / s_y for tensors of one shape.

    The kernels dequantize with one fused multiply-add, q s + (-z s), whose rounding shows where sums fall on ties.
    Arguments: a, s_a, z_a, b, s_b, z_b, s_y, zero_point, limits; QNNPACK (`fixed`) adds in 32-bit fixed point.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        a_scale: Tensor,
        a_zero: Tensor,
        b: Tensor,
        b_scale: Tensor,
        b_zero: Tensor,
        out_scale: Tensor,
        zero_point: Tensor,
        fixed: bool,
        limits: Limits,
    ) -> Tensor:
        if limits.rounds and fixed:
            u = _fixed_point_sum(a, a_scale / out_scale, b, b_scale / out_scale)
        elif limits.rounds:
            u = _dequantized(a, a_scale, a_zero).add_(_dequantized(b, b_scale, b_zero)).mul_(1 / out_scale)
        else:
            u = (a * a_scale).add_(b * b_scale).mul_(1 / out_scale)
        ctx.save_for_backward(a, a_scale, b_scale, out_scale, u)
        ctx.limits = limits
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        a, a_scale, b_scale, out_scale, u = ctx.saved_tensors
        needs = ctx.needs_input_grad
        passed = ctx.limits.inside(gradient, u)
        moment, left = dot(passed, u), dot(passed, a) / out_scale
        d_zero = ctx.limits.ends(gradient, u, passed.sum()) if needs[7] else None
        d_a = passed * (a_scale / out_scale) if needs[0] else None
        d_b = passed.mul_(b_scale / out_scale) if needs[3] else None
        right = (moment - left * a_scale) / b_scale  # u s_y = a s_a + b s_b
        return d_a, left, None, d_b, right, None, -moment / out_scale, d_zero, None, None


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """fma(q, s, -z s): codes * scale plus what the product z s loses in rounding."""
    if codes.is_cpu and not torch.compiler.is_compiling():
        exact = float(zero_point) * float(scale)
        lost = torch.scalar_tensor(exact - float(np.float32(exact)))
        return torch.add(lost, codes, alpha=float(scale))  # one fused multiply-add
    product = zero_point.double() * scale.double()
    return torch.addcmul((product - product.float()).float(), codes, scale)


def _fixed_point_sum(a: Tensor, a_ratio: Tensor, b: Tensor, b_ratio: Tensor) -> Tensor:
    """QNNPACK's add: multipliers of 22 bits, rounded half away from zero (qnnpack/requantization.h)."""
    _, exponent = torch.frexp(torch.maximum(a_ratio, b_ratio))
    power = torch.exp2(22.0 - exponent.double())
    a_whole, b_whole = torch.round(a_ratio.double() * power), torch.round(b_ratio.double() * power)
    total = (a.double() * a_whole + b.double() * b_whole) / power
    return (torch.sign(total) * torch.floor(total.abs() + 0.5)).float()


class LayerNorm(torch.autograd.Function):
    """u = ((codes - mean) / std * weight + bias) / s_y over the last dimensions; the input's scale enters by eps only.

    The kernels take the variance of a row as mean(q^2) - mean(q)^2 in float32, which is off where the row's codes
    vary little; such rows are corrected to it.
    Arguments: codes, s_x, z_x, weight, bias, s_y, zero_point, shape, eps, limits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scale: Tensor,
        in_zero: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        out_scale: Tensor,
        zero_point: Tensor,
        shape: list[int],
        eps: float,
        limits: Limits,
    ) -> Tensor:
        inverse = 1 / out_scale
        gain = inverse.expand(shape) if weight is None else weight * inverse
        shift = None if bias is None else bias * inverse
        codes = codes.contiguous()
        if torch.compiler.is_compiling():
            u, mean, rstd = _plain_layer_norm(codes, scale, in_zero, gain, shift, shape, eps, limits.rounds)
        else:
            small = eps / float(scale) ** 2
            u, mean, rstd = torch.native_layer_norm(codes, shape, gain.contiguous(), shift, small)
        if limits.rounds and not torch.compiler.is_compiling():
            ratio = _kernel_rstd(mean, rstd, in_zero, scale, eps) / rstd
            _correct_rows(u, ratio, shift, shape)
        ctx.save_for_backward(codes, scale, gain, shift, out_scale, u, mean, rstd)
        ctx.shape, ctx.limits = shape, limits
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale, gain, shift, out_scale, u, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        passed = ctx.limits.inside(gradient, u)
        d_out = -dot(passed, u) / out_scale
        mask = [True, False, False]
        d_codes = _aten.native_layer_norm_backward(passed, codes, ctx.shape, mean, rstd, gain, shift, mask)[0]
        d_zero = ctx.limits.ends(gradient, u, passed.sum()) if needs[6] else None
        # u does not change when codes and 1 / s_x grow together (eps / s_x^2 is what is added to the variance)
        d_scale = dot(d_codes, codes) / scale if needs[1] else None
        return d_codes, d_scale, None, None, None, d_out, d_zero, None, None, None


def _plain_layer_norm(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    shape: list[int],
    eps: float,
    rounds: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, mean and 1 / std by ops that a compiler fuses and that need no number on the host."""
    dims = list(range(-len(shape), 0))
    mean = codes.mean(dims, keepdim=True)
    centred = codes - mean
    rstd = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps / (scale * scale))
    factor = _kernel_rstd(mean, rstd, zero_point, scale, eps) if rounds else rstd
    u = centred * factor * gain
    return u if shift is None else u + shift, mean, rstd


def _kernel_rstd(mean: Tensor, rstd: Tensor, zero_point: Tensor, scale: Tensor, eps: float) -> Tensor:
    """1 / std of the codes of each row as the kernels get it, from the true mean and 1 / std."""
    exact_mean = mean.double() + zero_point
    variance = rstd.double().pow(-2) - eps / scale.double() ** 2
    squares = (variance + exact_mean * exact_mean).float()
    shifted = exact_mean.float()
    variance = torch.clamp_min(squares.double() - shifted.double() * shifted.double(), 0.0).float()
    return scale / torch.sqrt(variance * scale * scale + eps)


def _correct_rows(u: Tensor, ratio: Tensor, shift: Tensor | None, shape: list[int]) -> None:
    """Multiply u, less its bias, by a ratio per row, in place; where few rows change, only those."""
    flat, factor = u.view(-1, *shape), ratio.reshape(-1, *([1] * len(shape)))
    rows = ((factor - 1).abs() > 2e-6).flatten()
    count = int(rows.sum())
    if 4 * count > len(rows):
        flat.mul_(factor)
        if shift is not None:
            flat.addcmul_(shift, 1 - factor)
    elif count:
        base: Any = 0.0 if shift is None else shift
        flat[rows] = (flat[rows] - base) * factor[rows] + base
