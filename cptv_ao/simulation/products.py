"""What a weight does to codes: linear layers, convolutions and transposed ones, forward and backward."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.core.precision import cpu_products_in_bfloat16, gpu_products

_aten = torch.ops.aten


def tensor_cores(value: Tensor, wanted: bool = True) -> AbstractContextManager[None]:
    """Products in TF32 on a GPU, in bfloat16 on a CPU that is quicker at it, while the context lasts.

    Those of centred codes of eight bits are exact in both: whole numbers up to 256, summed up in float32.
    """
    if not wanted:
        return nullcontext()
    return gpu_products(tf32=True) if value.is_cuda else cpu_products_in_bfloat16()


class _Product:
    """What linear layers and convolutions have in common."""

    channel_dim: int

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def error(self, value: Tensor, weight: Tensor) -> Tensor:
        """Squared error of the output per channel (C,) that an error of the weight makes for an input."""
        output = self.forward(value, weight).square_()
        return output.sum([d for d in range(output.dim()) if d != self.channel_dim % output.dim()])

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        """What the rows of a weight, flattened to (C, K), are multiplied with, for an input: (groups, n, K), evenly
        spread where there are more than `most`; None where the outputs are no products of rows."""
        return None

    def over_weight(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values of the output's channels, (C,) or (), in the form in which they multiply a weight."""
        return values.reshape([-1] + [1] * (weight.dim() - 1))

    def per_channel(self, values: Tensor) -> Tensor:
        """The sums of values in the form of the weight over what belongs to each of the output's channels (C,)."""
        return values.flatten(1).sum(1)


@dataclass(frozen=True)
class Linear(_Product):
    """accumulator = codes @ weight.T, channels last."""

    channel_dim: int = -1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(codes, weight)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        rows = gradient.reshape(-1, gradient.shape[-1])
        d_codes = (rows @ weight).reshape(codes.shape) if mask[0] else None
        return d_codes, rows.t() @ codes.reshape(-1, codes.shape[-1]) if mask[1] else None

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        found = value.reshape(-1, value.shape[-1])
        return found[_spread(len(found), most)].unsqueeze(0)


@dataclass(frozen=True)
class Convolution(_Product):
    """accumulator = convolution of any rank, channels first; padding is zero, which is what zero_point stands for.

    Images are laid out channels last in memory, where forward and backward take half the time on a CPU; what follows
    keeps the layout. Not so for strided 1x1 kernels: oneDNN's gradient of these writes out of bounds with 3 channels
    last (seen on torch 2.14).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_dim: int = 1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        layout = self._layout(codes, weight)
        return torch.convolution(codes.contiguous(memory_format=layout), weight, None, *self.settings)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        layout = self._layout(codes, weight)
        gradient, codes = gradient.contiguous(memory_format=layout), codes.contiguous(memory_format=layout)
        return _aten.convolution_backward(gradient, codes, weight, None, *self.settings, [*mask, False])[:2]

    @property
    def settings(self) -> tuple[Any, ...]:
        """What follows the bias among the arguments of `torch.convolution`."""
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        sizes = weight.shape[2:]
        value = functional.pad(value, [side for amount in reversed(self.padding) for side in (amount, amount)])
        for dim, (size, stride, dilation) in enumerate(zip(sizes, self.stride, self.dilation, strict=True), 2):
            value = value.unfold(dim, dilation * (size - 1) + 1, stride)
            value = value[..., ::dilation]
        value = value.movedim(1, 1 + len(sizes))  # (N, *positions, channels, *sizes): a view of the input
        places = value.shape[: 1 + len(sizes)]
        chosen = torch.unravel_index(_spread(math.prod(places), most).to(value.device), places)
        return value[chosen].reshape(len(chosen[0]), self.groups, -1).transpose(0, 1)

    def _layout(self, codes: Tensor, weight: Tensor) -> torch.memory_format:
        strided_pointwise = weight[0, 0].numel() == 1 and max(self.stride) > 1
        return torch.channels_last if codes.dim() == 4 and not strided_pointwise else torch.contiguous_format


@dataclass(frozen=True)
class Transposed(Convolution):
    """A transposed convolution; its weight is (channels of the input, those of the output in a group, ...)."""

    output_padding: tuple[int, ...] = ()

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, True, self.output_padding, self.groups

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        return None

    def over_weight(self, values: Tensor, weight: Tensor) -> Tensor:
        if values.numel() == 1:
            return values.reshape([1] * weight.dim())
        inputs, outputs = weight.shape[0] // self.groups, weight.shape[1]
        grouped = values.reshape(self.groups, 1, outputs).expand(self.groups, inputs, outputs)
        return grouped.reshape(weight.shape[0], outputs, *[1] * (weight.dim() - 2))

    def per_channel(self, values: Tensor) -> Tensor:
        return values.reshape(self.groups, -1, values.shape[1], values[0, 0].numel()).sum((1, 3)).flatten()


@dataclass(frozen=True)
class Padded(_Product):
    """A convolution of an input that is padded with its own codes (`reflect`, `replicate`, `circular`).

    Args:
        pads: as for `functional.pad`.
    """

    inner: Convolution
    pads: tuple[int, ...]
    mode: str
    channel_dim: int = 1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        return self.inner.forward(functional.pad(codes, self.pads, self.mode), weight)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        with torch.enable_grad():
            given = codes.detach().requires_grad_()
            padded = functional.pad(given, self.pads, self.mode)
        d_padded, d_weight = self.inner.backward(gradient, padded.detach(), weight, mask)
        return torch.autograd.grad(padded, given, d_padded)[0] if mask[0] else None, d_weight

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        return self.inner.rows(functional.pad(value, self.pads, self.mode), weight, most)


@dataclass(frozen=True)
class Line(_Product):
    """A convolution of one dimension whose weight (C, C', 1, K) is packed as one of two, as functional ones are."""

    inner: Convolution
    channel_dim: int = 1

    def forward(self, codes: Tensor, weight: Tensor) -> Tensor:
        return self.inner.forward(codes.unsqueeze(2), weight).squeeze(2)

    def backward(self, gradient: Tensor, codes: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> Any:
        d_codes, d_weight = self.inner.backward(gradient.unsqueeze(2), codes.unsqueeze(2), weight, mask)
        return None if d_codes is None else d_codes.squeeze(2), d_weight

    def rows(self, value: Tensor, weight: Tensor, most: int) -> Tensor | None:
        return self.inner.rows(value.unsqueeze(2), weight, most)

    def over_weight(self, values: Tensor, weight: Tensor) -> Tensor:
        return self.inner.over_weight(values, weight)

    def per_channel(self, values: Tensor) -> Tensor:
        return self.inner.per_channel(values)


Product = Linear | Convolution | Padded | Line


def product_of(module: nn.Module) -> Product:
    """Of a quantized module with a weight."""
    owner = cast(Any, module)
    if isinstance(module, nnq.Linear):
        return Linear()
    rank = len(owner.kernel_size)
    stride, padding, dilation = (_each(getattr(owner, k), rank) for k in ("stride", "padding", "dilation"))
    if owner.transposed:
        return Transposed(stride, padding, dilation, owner.groups, output_padding=_each(owner.output_padding, rank))
    if owner.padding_mode == "zeros":
        return Convolution(stride, padding, dilation, owner.groups)
    pads = tuple(pad for pad in reversed(padding) for _ in range(2))
    return Padded(Convolution(stride, (0,) * rank, dilation, owner.groups), pads, owner.padding_mode)


def packed_product(packed: Any, op: Any) -> Product:
    """Of the packed weight of a functional linear or convolution, which `op` of torch.ops computes with."""
    if not hasattr(packed, "stride"):
        return Linear()
    stride, padding, dilation = tuple(packed.stride()), tuple(packed.padding()), tuple(packed.dilation())
    product = Convolution(stride, padding, dilation, packed.groups())
    if packed.transpose():
        own = tuple(packed.output_padding())
        product = Transposed(stride, padding, dilation, packed.groups(), output_padding=own)
    return Line(product) if op in _LINES else product


def _spread(count: int, most: int) -> Tensor:
    """Places of so many, or of some of them."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


# Functional convolutions of one dimension, whose weights are packed as those of two.
_LINES = {
    torch.ops.quantized.conv1d,
    torch.ops.quantized.conv1d_relu,
    torch.ops.quantized.conv_transpose1d,
}
