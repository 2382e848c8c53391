"""The quantized ops of the twin, in the order of rounding of the kernels, in float arithmetic.

A linear or convolution accumulates centred integers, which is exact in float32 below 2^24, then rescales:
round((acc + b / (s_x s_w)) * (s_x s_w / s_y)) + z_y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.sites import QParams, ScaleSite
from cptv_ao.twin.values import QTensor, Rounding, fit, straight_through_round


class SiteModule(nn.Module):
    """Scale and zero_point of one site as buffers, so that `functional_call` can replace them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, site: ScaleSite, qparams: QParams) -> None:
        super().__init__()
        self.site = site
        self.rounding: Rounding = "round"
        self.register_buffer("scale", qparams.scale.to(torch.float32))
        self.register_buffer("zero_point", qparams.zero_point.to(torch.float32))

    def whole_zero_point(self) -> Tensor:
        """The zero_point, rounded straight through: an optimizer moves it in fractions."""
        return straight_through_round(self.zero_point) if self.rounding == "round" else self.zero_point


class Quantizer(SiteModule):
    """An activation site: puts floats on its scale."""

    def forward(self, value: Tensor) -> QTensor:
        return self.rescaled(value * (1 / self.scale))

    def rescaled(self, centred: Tensor) -> QTensor:
        """Codes from values that are in units of this scale already."""
        zero_point, site = self.whole_zero_point(), self.site
        codes = fit(centred, zero_point, site.qmin, site.qmax, self.rounding)
        return QTensor(codes, self.scale, zero_point, site.qmin, site.qmax, self.rounding)


class WeightQuantizer(SiteModule):
    """A weight site: the codes as they are in the model, or re-rounded from a float weight at the present scale."""

    def __init__(self, site: ScaleSite, qparams: QParams, codes: Tensor, float_weight: Tensor | None) -> None:
        super().__init__(site, qparams)
        self._shape = [1] * codes.dim()
        if site.axis is not None:
            self._shape[site.axis] = -1
        self.register_buffer("codes", codes.to(torch.float32) - self.zero_point.reshape(self._shape))
        self.register_buffer("weight", float_weight)
        #: take the codes from the model (True) or from the float weight at the present scale (False)
        self.keep_codes = True

    def forward(self) -> tuple[Tensor, Tensor]:
        """Centred codes (C, ...) and their scale, broadcastable against them."""
        scale = self.scale.reshape(self._shape)
        if self.keep_codes or self.weight is None:
            return self.codes, scale
        zero_point = self.zero_point.reshape(self._shape)
        return fit(self.weight / scale, zero_point, self.site.qmin, self.site.qmax, "round"), scale


class Weighted(nn.Module):
    """A quantized linear or convolution, with or without a fused ReLU.

    Args:
        op: `(codes, weight codes) -> accumulator`, linear in both and without bias.
        channel_dim: dimension of the output channels in the accumulator (-1 linear, 1 convolution).
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: WeightQuantizer,
        output: Quantizer,
        bias: Tensor | None,
        op: Callable[[Tensor, Tensor], Tensor],
        channel_dim: int,
        relu: bool,
    ) -> None:
        super().__init__()
        self.weight, self.output = weight, output
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._op, self._channel_dim, self._relu = op, channel_dim, relu

    def forward(self, value: QTensor) -> QTensor:
        codes, scale = self.weight()
        accumulator = self._op(value.codes, codes)
        shape = [1] * accumulator.dim()
        shape[self._channel_dim] = -1
        product = (value.scale * scale).reshape(shape) if scale.numel() > 1 else (value.scale * scale).reshape(())
        if self.bias is not None:
            accumulator = accumulator + self.bias.reshape(shape) / product
        centred = accumulator * (product / self.output.scale)
        return self.output.rescaled(functional.relu(centred) if self._relu else centred)


class Binary(nn.Module):
    """quantized.add, quantized.mul and their fused ReLU."""

    def __init__(self, output: Quantizer, op: Callable[[Tensor, Tensor], Tensor], relu: bool) -> None:
        super().__init__()
        self.output, self._op, self._relu = output, op, relu

    def forward(self, a: QTensor, b: QTensor, *_: Any) -> QTensor:
        value = self._op(a.dequantize(), b.dequantize())
        return self.output(functional.relu(value) if self._relu else value)


class Pointwise(nn.Module):
    """An op that the kernel computes in float on dequantized values (layer_norm, hardswish, softmax ...)."""

    def __init__(self, output: Quantizer, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.output, self._op = output, op

    def forward(self, value: QTensor, *args: Any, **kwargs: Any) -> QTensor:
        return self.output(self._op(value.dequantize(), *args, **kwargs))


class ScaledBy(nn.Module):
    """quantized.mul(q, number): the codes stay, the scale is multiplied."""

    def forward(self, value: QTensor, factor: float) -> QTensor:
        if factor < 0:  # the codes are mirrored in their range
            mirrored = value.low + value.high - value.zero_point
            return replace(value, codes=-value.codes, scale=value.scale * -factor, zero_point=mirrored)
        return replace(value, scale=value.scale * factor)
