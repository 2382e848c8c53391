"""The quantized ops of the twin, in the order of rounding of the kernels, in float arithmetic.

A linear or convolution accumulates centred integers, which is exact in float32 below 2^24, then rescales:
round((acc + b / (s_x s_w)) * (s_x s_w / s_y)) + z_y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.autograd_ops import Add, QuantizedProduct
from cptv_ao.simulation.layer_norm import LayerNorm
from cptv_ao.simulation.limits import Limits
from cptv_ao.simulation.products import Product
from cptv_ao.simulation.qtensor import QTensor, dequantize
from cptv_ao.simulation.quantizers import Quantizer, WeightQuantizer
from cptv_ao.simulation.weighted_layer import WeightedLayer


class QuantizedLayer(WeightedLayer):
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
        super().__init__(weight, product)
        self.output = output
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._relu, self._whole_bias, self._behind = relu, whole_bias, behind

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
        named = {name: dequantize(part) for name, part in settings.items()}
        result: QTensor = self.output(self._op(*(value.dequantize() for value in values), **named))
        return result


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    left, right = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    return left, right
