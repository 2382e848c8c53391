"""The quantized ops of the twin, in the order of rounding of the kernels, in float arithmetic.

A linear or convolution accumulates centred integers, which is exact in float32 below 2^24, then rescales:
round((acc + b / (s_x s_w)) * (s_x s_w / s_y)) + z_y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.core.qparams import SHIFT_PARTS, QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import along_axis, nearest_codes, weight_steps
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.autograd_ops import Add, Quantize, QuantizedProduct, RoundWeight
from cptv_ao.simulation.layer_norm import LayerNorm
from cptv_ao.simulation.limits import Limits, Rounding
from cptv_ao.simulation.products import Product
from cptv_ao.simulation.qtensor import QTensor, straight_through_round


class SiteModule(OutOfPlace):
    """Scale and zero_point of one site as buffers, so that `functional_call` can replace them."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, site: ScaleSite, qparams: QParams) -> None:
        super().__init__()
        self.site = site
        self.rounding: Rounding = "round"
        self.register_buffer("scale", qparams.scale.to(torch.float32))
        self.register_buffer("zero_point", qparams.zero_point.to(torch.float32))

    def follow(self, other: SiteModule) -> None:
        """Hold what another one of the same site does."""
        self.site, self.rounding = other.site, other.rounding
        for name, value in other._buffers.items():
            setattr(self, name, value)

    def state(self) -> tuple[Tensor | None, ...]:
        """What it holds, for `restore`: copies, but of what nobody writes into."""
        return self.scale.clone(), self.zero_point.clone()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Put back what `state` returned."""
        self.scale.copy_(state[0])
        self.zero_point.copy_(state[1])

    def limit(self, qmax: int) -> None:
        """Clip codes at `qmax`."""
        self.site = replace(self.site, qmax=qmax)


class Quantizer(SiteModule):
    """An activation site: puts floats on its scale; `passes`: they are on it already."""

    passes = False

    def forward(self, value: Tensor | QTensor) -> QTensor:
        if self.passes:
            assert isinstance(value, QTensor)
            return value
        like, limits = self.like()
        return like.with_codes(Quantize.apply(value, like.scale, like.zero_point, limits))

    def like(self, relu: bool = False) -> tuple[QTensor, Limits]:
        """A tensor on this scale, without codes yet, and what rounds them."""
        zero_point = self.zero_point
        if self.rounding == "round" and zero_point.requires_grad:  # an optimizer moves it in fractions
            zero_point = straight_through_round(zero_point)
        like = QTensor(self.scale, self.scale, zero_point, self.site.qmin, self.site.qmax, self.rounding)
        return like, like.limits(relu)


class WeightQuantizer(SiteModule):
    """A weight site: the codes as they are in the model, or re-rounded from a float weight at the present scale."""

    codes: Tensor
    weight: Tensor | None
    shift: Tensor | None
    correction: Tensor | None

    def __init__(
        self, site: ScaleSite, qparams: QParams, codes: Tensor, float_weight: Tensor | None, shiftable: bool
    ) -> None:
        super().__init__(site, qparams)
        self._symmetric = not site.affine and not bool(self.zero_point.any())
        self.register_buffer("codes", codes.to(torch.float32) - along_axis(self.zero_point, site.axis, codes.dim()))
        self.register_buffer("weight", None if float_weight is None else float_weight.clone())
        #: in steps, -0.5 to 0.5; see `QParams`
        self.register_buffer("shift", None)
        #: of the bias; see `QParams`
        self.register_buffer("correction", None)
        self.set_beside(qparams)
        #: whether weights may be rounded to other codes than the nearest
        self.shiftable = shiftable and float_weight is not None
        #: take the codes from `codes` (True) or from the float weight at the present scale (False)
        self.keep_codes = True

    def follow(self, other: SiteModule) -> None:
        super().follow(other)
        assert isinstance(other, WeightQuantizer)
        self.keep_codes = other.keep_codes

    def set_beside(self, qparams: QParams) -> None:
        """Round as the shift of qparams says, and correct the bias so."""
        shift, correction, device = qparams.shift_steps, qparams.correction, self.scale.device
        self.shift = None if shift is None else shift.to(device)
        self.correction = None if correction is None else correction.to(device)

    def state(self) -> tuple[Tensor | None, ...]:
        return (*super().state(), self.codes.clone(), self.shift, self.correction)

    def restore(self, state: tuple[Any, ...]) -> None:
        super().restore(state)
        self.codes.copy_(state[2])
        self.shift, self.correction = state[3:]

    def add_correction(self, by: Tensor) -> None:
        """Correct the bias by so much more (C,)."""
        self.correction = by if self.correction is None else self.correction + by

    def corrected(self, bias: Tensor | None) -> Tensor | None:
        """The bias of the layer; as it was given where it computes in float."""
        if self.correction is None or self.rounding == "none":
            return bias
        return self.correction if bias is None else bias + self.correction

    def forward(self) -> Tensor:
        """Centred codes (C, ...)."""
        return self.codes if self.keep_codes or self.weight is None else self._rounded()

    def dequantize(self) -> Tensor:
        """The weight as a float tensor (C, ...)."""
        value: Tensor = self() * along_axis(self.scale, self.site.axis, self.codes.dim())
        return value

    def refresh(self) -> None:
        """Re-round `codes` at the present scale, where the float weight is known."""
        if self.weight is not None:
            self.codes.copy_(self._rounded())

    def error(self, scale: Tensor) -> Tensor:
        """How far the float weight, rounded at a scale, is from itself (C, ...)."""
        assert self.weight is not None
        site, dims = self.site, self.weight.dim()
        zero_point = along_axis(self.zero_point, site.axis, dims)
        codes = nearest_codes(weight_steps(self.weight, scale, site.axis), zero_point, site.qmin, site.qmax)
        return codes.sub_(zero_point).mul_(along_axis(scale, site.axis, dims)).sub_(self.weight)

    def present_error(self) -> Tensor | None:
        """How far the codes, as they are, are from the float weight (C, ...); None where that is not known."""
        if self.weight is None:
            return None
        return self.codes * along_axis(self.scale, self.site.axis, self.codes.dim()) - self.weight

    def _rounded(self) -> Tensor:
        site = self.site
        if self._symmetric:
            limits = Limits(site.qmin, site.qmax, self.rounding == "round")
        else:
            zero_point = along_axis(self.zero_point.round(), site.axis, self.codes.dim())  # one may move in fractions
            limits = Limits.of(zero_point, site.qmin, site.qmax, self.rounding)
        if self.rounding == "none":
            limits = Limits.of(self.scale, site.qmin, site.qmax, "none")
        shift = self.shift if self.rounding == "round" else None
        codes: Tensor = RoundWeight.apply(self.weight, self.scale, site.axis, limits, shift)
        return codes


def shift_codes(shift: Tensor) -> Tensor:
    """A shift in steps as that of qparams."""
    return (shift.detach() * SHIFT_PARTS).round().to("cpu", torch.int8)


class QuantizedLayer(OutOfPlace):
    """A quantized linear or convolution, with what is fused behind it.

    Args:
        relu: whether that is a ReLU, which clamps codes.
        behind: another function of the output, that is computed before it is rounded.
        whole_bias: the kernel rounds the bias to whole accumulator units (QNNPACK).
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: WeightQuantizer,
        output: Quantizer,
        bias: Tensor | None,
        product: Product,
        relu: bool,
        whole_bias: bool,
        behind: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.output = weight, output
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._product, self._relu, self._whole_bias, self._behind = product, relu, whole_bias, behind

    def forward(self, value: QTensor, added: QTensor | None = None) -> QTensor:
        """Of a value, and of another one that is added to the product before anything else."""
        like, limits = self.output.like(self._relu)
        fused = added is not None or self._behind is not None
        if fused:
            limits = Limits.of(like.zero_point, like.low, like.high, "none")
        bias = self.weight.corrected(self.bias)
        given = (value.codes, value.scale, self.weight(), self.weight.scale, bias, like.scale, like.zero_point)
        u: Tensor = QuantizedProduct.apply(*given, self._product, self._whole_bias, limits)
        return self._finished(u, added, like) if fused else like.with_codes(u)

    def _finished(self, u: Tensor, added: QTensor | None, like: QTensor) -> QTensor:
        if added is not None:
            u = u + added.codes * (added.scale / like.scale)
        if self._behind is not None:
            u = self._behind(u * like.scale) / like.scale
        return like.fitted(functional.relu(u) if self._relu else u)

    @property
    def channel_dim(self) -> int:
        """Where the channels of the input, and of the output, are."""
        return self._product.channel_dim

    def weight_error(self, value: Tensor, scale: Tensor) -> Tensor:
        """Squared error of the output per channel (C,) when a float input meets the weight rounded at a scale."""
        return self._product.error(value, self.weight.error(scale))

    def weight_shift(self, value: Tensor) -> Tensor | None:
        """What the rounding of the weight, as it is, adds to the output for a float input."""
        error = self.weight.present_error()
        return None if error is None else self._product.forward(value, error)

    def rows(self, value: Tensor, most: int) -> Tensor | None:
        """What the rows of the weight, flattened to (C, K), are multiplied with for a float input, (groups, n, K); None
        where it has none."""
        return self._product.rows(value, self.weight.codes, most)


class Sum(OutOfPlace):
    """quantized.add and its fused ReLU."""

    def __init__(self, output: Quantizer, relu: bool, fixed_point: bool) -> None:
        super().__init__()
        self.output, self._relu, self._fixed_point = output, relu, fixed_point

    def forward(self, a: QTensor, b: QTensor) -> QTensor:
        like, limits = self.output.like(self._relu)
        fixed = self._fixed_point and a.codes.shape == b.codes.shape
        left, right = (a.codes, b.codes) if a.codes.shape == b.codes.shape else _broadcast(a.codes, b.codes)
        given = (left, a.scale, a.zero_point.detach(), right, b.scale, b.zero_point.detach())
        return like.with_codes(Add.apply(*given, like.scale, like.zero_point, fixed, limits))


class Times(OutOfPlace):
    """quantized.mul and its fused ReLU: the product of the centred codes is rescaled once."""

    def __init__(self, output: Quantizer, relu: bool) -> None:
        super().__init__()
        self.output, self._relu = output, relu

    def forward(self, a: QTensor, b: QTensor) -> QTensor:
        like, _limits = self.output.like()
        u = a.codes * b.codes * (a.scale * b.scale * (1 / like.scale))
        return like.fitted(functional.relu(u) if self._relu else u)


class Norm(OutOfPlace):
    """quantized.layer_norm."""

    def __init__(self, output: Quantizer) -> None:
        super().__init__()
        self.output = output

    def forward(
        self, value: QTensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> QTensor:
        like, limits = self.output.like()
        given = (value.codes, value.scale, value.zero_point.detach(), weight, bias, like.scale, like.zero_point)
        return like.with_codes(LayerNorm.apply(*given, list(shape), eps, limits))


class NormModule(Norm):
    """nnq.LayerNorm, which holds its weight itself."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, output: Quantizer, module: Any) -> None:
        super().__init__(output)
        self._shape, self._eps = module.normalized_shape, module.eps
        for name in ("weight", "bias"):
            value = getattr(module, name)
            self.register_buffer(name, None if value is None else value.detach().clone())

    def forward(self, value: QTensor) -> QTensor:  # type: ignore[override]
        return super().forward(value, self._shape, self.weight, self.bias, self._eps)


class Pointwise(OutOfPlace):
    """An op that the kernel computes in float on dequantized values (hardswish, softmax, matmul ...)."""

    def __init__(self, output: Quantizer, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.output, self._op = output, op

    def forward(self, *values: QTensor, **settings: Any) -> QTensor:
        named = {name: part.dequantize() if isinstance(part, QTensor) else part for name, part in settings.items()}
        result: QTensor = self.output(self._op(*(value.dequantize() for value in values), **named))
        return result


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    left, right = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    return left, right
