"""quantized.layer_norm of the twin as an autograd function, with the rounding of the kernels' float32 variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cptv_ao.simulation import fused
from cptv_ao.simulation.limits import Limits
from cptv_ao.simulation.qtensor import dot

_aten = torch.ops.aten


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
        plain = torch.compiler.is_compiling() or not codes.is_cpu
        if plain:
            rounded = in_zero if limits.rounds else None
            u, mean, rstd = _plain_layer_norm(codes, scale, rounded, gain, shift, shape, eps)
        else:
            small = eps / float(scale) ** 2
            u, mean, rstd = torch.native_layer_norm(codes, shape, gain.contiguous(), shift, small)
        if limits.rounds and not plain:
            ratio = _kernel_rstd(mean, rstd, in_zero, scale, eps) / rstd
            _correct_rows(u, ratio, shift, shape)
        ctx.save_for_backward(codes, scale, gain, shift, out_scale, u, mean, rstd)
        ctx.shape, ctx.limits, ctx.fused = shape, limits, fused.takes(u)
        return fused.fit(u, torch.ones_like(scale), None, limits) if ctx.fused else limits.fit(u)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        codes, scale, gain, shift, out_scale, u, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if ctx.fused:
            passed, (_, moment, d_zero) = fused.pull(gradient, u, torch.ones_like(scale), None, ctx.limits)
        else:
            passed = ctx.limits.inside(gradient, u)
            moment = dot(passed, u)
            d_zero = ctx.limits.ends(gradient, u, passed.sum()) if needs[6] else None
        d_out, mask = -moment / out_scale, [True, False, False]
        d_codes = _aten.native_layer_norm_backward(passed, codes, ctx.shape, mean, rstd, gain, shift, mask)[0]
        # u does not change when codes and 1 / s_x grow together (eps / s_x^2 is what is added to the variance)
        d_scale = dot(d_codes, codes) / scale if needs[1] else None
        return d_codes, d_scale, None, None, None, d_out, d_zero, None, None, None


def _plain_layer_norm(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """u, mean and 1 / std by ops that a compiler fuses and that need no number on the host.

    Args:
        zero_point: of the input, where u is to have the kernels' rounding of 1 / std; None where not.
    """
    dims = list(range(-len(shape), 0))
    variance, mean = torch.var_mean(codes, dims, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps / (scale * scale))
    factor = rstd if zero_point is None else _kernel_rstd(mean, rstd, zero_point, scale, eps)
    scaled = (codes - mean) * factor
    return scaled * gain if shift is None else torch.addcmul(shift, scaled, gain), mean, rstd


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
