"""Kernels of torch that do not compute what they are for: transposed convolutions (torch 2.14).

oneDNN's (the engines x86 and onednn) take the weight of a group, (inputs, outputs, ...), for one of (outputs, inputs,
...) where these two numbers differ; FBGEMM's are wrong for some kernels that are as large as their stride.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SIZE, _ZERO = 8, 60
# Share of the codes that may be off by more than one.
_TOLERATED = 1e-3


def is_right(packed: Any) -> bool:
    """Whether a kernel computes with the weight that was packed; tried where it is known that some do not, on another
    packed alike: QNNPACK remembers the scales that one was first used with."""
    if not hasattr(packed, "transpose") or not packed.transpose():
        return True
    weight: Tensor = packed.unpack()[0]
    if weight.qscheme() != torch.per_tensor_affine:
        return True
    shape = 2, len(weight), *[_SIZE] * (weight.dim() - 2)
    codes = torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))
    meant = _meant(packed, weight, codes)
    scale = float(meant.abs().max()) / 100 or 1.0
    ops = torch.ops.quantized
    prepack, op = {
        4: (ops.conv_transpose2d_prepack, ops.conv_transpose2d),
        5: (ops.conv_transpose3d_prepack, ops.conv_transpose3d),
    }[weight.dim()]
    settings = packed.stride(), packed.padding(), packed.output_padding(), packed.dilation(), packed.groups()
    own = prepack(weight, packed.unpack()[1], *settings)
    given = torch._make_per_tensor_quantized_tensor(codes.to(torch.uint8), 1.0, _ZERO)
    off = (op(given, own, scale, 128).int_repr().int() - 128 - meant / scale).abs() > 1
    return float(off.float().mean()) <= _TOLERATED


def _meant(packed: Any, weight: Tensor, codes: Tensor) -> Tensor:
    settings = packed.stride(), packed.padding(), packed.dilation(), True, packed.output_padding(), packed.groups()
    bias: Tensor | None = packed.unpack()[1]
    bias = None if bias is None else bias.detach()
    return torch.convolution(codes.float() - _ZERO, weight.dequantize(), bias, *settings)
