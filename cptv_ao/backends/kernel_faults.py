"""Kernels of torch that read a packed weight in a wrong order, and packing it for another one that does not.

oneDNN's transposed convolutions (the engines x86 and onednn, torch 2.14) take the weight of a group, (inputs, outputs,
...), for one of (outputs, inputs, ...) where these two numbers differ: the model computes with scrambled weights.
FBGEMM's are right, and any engine runs what is packed for FBGEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_RIGHT = "fbgemm"


def in_order(packed: Any) -> bool:
    """Whether a kernel computes with the weight that was packed: tried where it is known that some do not."""
    if not hasattr(packed, "transpose") or not packed.transpose():
        return True
    weight: Tensor = packed.unpack()[0]
    if weight.shape[0] == weight.shape[1] * packed.groups() or weight.qscheme() != torch.per_tensor_affine:
        return True
    return bool(torch.equal(_computed(packed, weight), _meant(packed, weight)))


def _ones(weight: Tensor) -> Tensor:
    """An image for each channel, which is 1 there and 0 elsewhere."""
    channels = len(weight)
    return torch.eye(channels).reshape(channels, channels, *[1] * (weight.dim() - 2))


def _computed(packed: Any, weight: Tensor) -> Tensor:
    op = {4: torch.ops.quantized.conv_transpose2d, 5: torch.ops.quantized.conv_transpose3d}[weight.dim()]
    ones = torch._make_per_tensor_quantized_tensor(_ones(weight).to(torch.uint8), 1.0, 0)
    codes: Tensor = op(ones, packed, weight.q_scale(), 128).int_repr()
    return codes


def _meant(packed: Any, weight: Tensor) -> Tensor:
    bias = packed.unpack()[1]
    settings = packed.stride(), packed.padding(), packed.dilation(), True, packed.output_padding(), packed.groups()
    codes = torch.convolution(_ones(weight), weight.int_repr().float() - weight.q_zero_point(), None, *settings)
    if bias is not None:
        codes += (bias / weight.q_scale()).reshape(-1, *[1] * (weight.dim() - 2))
    return (codes.round() + 128).clamp(0, 255).to(torch.uint8)


@contextmanager
def packing_for_the_right_one() -> Iterator[None]:
    """What is packed inside is for an engine whose kernels are right, if this torch has it."""
    before = torch.backends.quantized.engine
    try:
        if _RIGHT in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = _RIGHT
        yield
    finally:
        torch.backends.quantized.engine = before
