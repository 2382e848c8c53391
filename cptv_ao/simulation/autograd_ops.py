"""The quantized ops of the twin as autograd functions: kernel-exact codes forward, few passes backward.

Each takes and gives centred codes. `u` is the value in units of the output's scale before it is rounded; the
gradient with respect to it passes straight through the rounding, and stops where the codes are clipped. Gradients of
scales follow from sums of `gradient * u`, so that no other pass over an activation is needed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptv_ao.core.weight_rounding import weight_steps
from cptv_ao.simulation import fused
from cptv_ao.simulation.limits import Limits
from cptv_ao.simulation.products import Product, tensor_cores
from cptv_ao.simulation.qtensor import dot


class Quantize(torch.autograd.Function):
    """codes = fit(value / scale). Arguments: value, scale (), zero_point (), limits."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, zero_point: Tensor, limits: Limits) -> Tensor:
        inverse = 1 / scale
        ctx.limits, ctx.fused = limits, fused.takes(value)
        if ctx.fused:
            ctx.save_for_backward(value, inverse)
            return fused.fit(value, inverse, None, limits)
        u = limits.numbers(value * inverse)
        ctx.save_for_backward(u, inverse)
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        u, inverse = ctx.saved_tensors
        if ctx.fused:
            passed, sums = fused.pull(gradient, u, inverse, None, ctx.limits, factor=inverse)
            return passed, -sums[1] * inverse, sums[2], None
        passed = ctx.limits.inside(gradient, u)
        d_scale = -dot(passed, u) * inverse if ctx.needs_input_grad[1] else None
        d_zero = ctx.limits.ends(gradient, u, passed.sum()) if ctx.needs_input_grad[2] else None
        return passed.mul_(inverse) if ctx.needs_input_grad[0] else None, d_scale, d_zero, None


class RoundWeight(torch.autograd.Function):
    """codes = fit(weight / scale + shift) along the channel axis. The weight itself gets no gradient.

    The steps are found again where they are wanted: numbers as large as all weights would be held else.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, axis: int | None, limits: Limits, shift: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, shift)
        ctx.axis, ctx.limits = axis, limits
        u = weight_steps(weight, scale, axis)
        return limits.fit(u if shift is None else u.add_(shift))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale, shift = ctx.saved_tensors
        steps = weight_steps(weight, scale, ctx.axis)
        d_shift = ctx.limits.inside(gradient, steps if shift is None else steps + shift)
        d_scale = None
        if ctx.needs_input_grad[1]:
            dims = [d for d in range(weight.dim()) if d != ctx.axis]
            d_scale = -steps.mul_(d_shift).sum(dims).reshape(scale.shape) / scale
        return None, d_scale, None, None, d_shift if ctx.needs_input_grad[4] else None


class Clamp(torch.autograd.Function):
    """codes = fit(clamp(codes, low / scale, high / scale)). Arguments: codes, scale (), low, high (real), limits."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, low: float, high: float, limits: Limits) -> Tensor:
        ctx.bounds = (low, high)
        ctx.limits = replace(limits.within(low / scale, high / scale), relu=low == 0)
        ctx.save_for_backward(codes, scale)
        return codes.clamp(ctx.limits.low, ctx.limits.high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale = ctx.saved_tensors
        passed = ctx.limits.inside(gradient, codes)
        d_scale = None
        if ctx.needs_input_grad[1]:  # a code that is cut off is an end over the scale
            d_scale = torch.zeros_like(scale)
            for end, other in zip(ctx.bounds, ({"high": math.inf}, {"low": -math.inf}), strict=True):
                if end and math.isfinite(end):
                    cut = gradient.sum() - replace(ctx.limits, **other).inside(gradient, codes).sum()
                    d_scale -= cut * end / scale.square()
        return passed if ctx.needs_input_grad[0] else None, d_scale, None, None, None


class QuantizedProduct(torch.autograd.Function):
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
        with tensor_cores(codes, limits.rounds):
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
        ctx.product, ctx.limits, ctx.fused = product, limits, fused.takes(u, product.channel_dim)
        ctx.save_for_backward(codes, scale, weight, weight_scale, bias, out_scale, u, multiplier, offset)
        if ctx.fused:
            return fused.fit(u, multiplier, offset, limits, product.channel_dim)
        if offset is not None:
            u.add_(offset.reshape(shape))
        u.mul_(multiplier.reshape(shape) if multiplier.dim() else multiplier)
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale, weight, weight_scale, bias, out_scale, u, multiplier, offset = ctx.saved_tensors
        needs, product = ctx.needs_input_grad, ctx.product
        ends: Tensor | None
        if ctx.fused:
            passed, sums = fused.pull(gradient, u, multiplier, offset, ctx.limits, None, product.channel_dim)
            total, moment, ends = sums[0], sums[1], sums[2].sum()
        else:
            passed = ctx.limits.inside(gradient, u)
            dims = [d for d in range(u.dim()) if d != product.channel_dim % u.dim()]
            total, moment = passed.sum(dims), None
            ends = ctx.limits.ends(gradient, u, total.sum()) if needs[6] else None
        per_weight = product.over_weight(multiplier, weight)
        d_codes, d_weight = product.backward(passed, codes, weight * per_weight, (needs[0], needs[2]))
        if moment is None and d_weight is None:
            moment = (passed * u).sum(dims)
        elif moment is None:  # sum(passed * u) from the weight's gradient: u is linear in the weight
            moment = product.per_channel(d_weight * weight)
            moment = (moment if offset is None else moment + offset * total) * multiplier
        d_weight = None if d_weight is None else d_weight.mul_(per_weight)
        direct = moment if bias is None else moment - total * bias / out_scale
        d_weight_scale = direct / weight_scale if weight_scale.dim() else direct.sum() / weight_scale
        d_out = -moment.sum() / out_scale
        d_bias = total / out_scale if bias is not None and needs[4] else None
        return d_codes, direct.sum() / scale, d_weight, d_weight_scale, d_bias, d_out, ends, None, None, None


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
        ctx.limits, ctx.fused = limits, not fixed and fused.takes(a)
        if ctx.fused:
            lost = (
                (_lost(a_scale, a_zero), _lost(b_scale, b_zero)) if limits.rounds else [torch.zeros_like(a_scale)] * 2
            )
            factors = torch.stack([a_scale, lost[0], b_scale, lost[1], 1 / out_scale]).detach()
            ctx.save_for_backward(a, a_scale, b_scale, out_scale, b, factors)
            return fused.add(a, b, factors, limits)
        if limits.rounds and fixed:
            u = _fixed_point_sum(a, a_scale / out_scale, b, b_scale / out_scale)
        elif limits.rounds:
            u = _dequantized(a, a_scale, a_zero).add_(_dequantized(b, b_scale, b_zero)).mul_(1 / out_scale)
        else:
            u = (a * a_scale).add_(b * b_scale).mul_(1 / out_scale)
        ctx.save_for_backward(a, a_scale, b_scale, out_scale, u)
        return limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        a, a_scale, b_scale, out_scale, u, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_a: Tensor | None
        d_b: Tensor | None
        d_zero: Tensor | None
        if ctx.fused:  # what is saved as u is b
            d_a, d_b, sums = fused.pull_add(gradient, a, u, rest[0], ctx.limits)
            moment, left, d_zero = sums[0], sums[1] / out_scale, sums[2]
        else:
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
    return torch.addcmul(_lost(scale, zero_point), codes, scale)


def _lost(scale: Tensor, zero_point: Tensor) -> Tensor:
    """What the product z s loses in rounding, ()."""
    product = zero_point.double() * scale.double()
    return (product - product.float()).float()


def _fixed_point_sum(a: Tensor, a_ratio: Tensor, b: Tensor, b_ratio: Tensor) -> Tensor:
    """QNNPACK's add: multipliers of 22 bits, rounded half away from zero (qnnpack/requantization.h)."""
    _, exponent = torch.frexp(torch.maximum(a_ratio, b_ratio))
    power = torch.exp2(22.0 - exponent.double())
    a_whole, b_whole = torch.round(a_ratio.double() * power), torch.round(b_ratio.double() * power)
    total = (a.double() * a_whole + b.double() * b_whole) / power
    return (torch.sign(total) * torch.floor(total.abs() + 0.5)).float()
