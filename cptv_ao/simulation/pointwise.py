"""Quantized ops that the kernels compute in float on dequantized values: what they compute, by type and by packet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.fx.ops import by_type

Function = Callable[..., Tensor]


def _batch_norm(module: Any, relu: bool = False) -> Function:
    held = [_Own(getattr(module, k)) for k in ("running_mean", "running_var", "weight", "bias")]
    eps = module.eps

    def compute(x: Tensor) -> Tensor:
        mean, var, weight, bias = (part.at(x) for part in held)
        out = functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        return functional.relu(out) if relu else out

    return compute


def _instance_norm(module: Any) -> Function:
    weight, bias, eps = _Own(module.weight), _Own(module.bias), module.eps
    return lambda x: instance_norm(x, weight.at(x), bias.at(x), eps)


def _group_norm(module: Any) -> Function:
    weight, bias, groups, eps = _Own(module.weight), _Own(module.bias), module.num_groups, module.eps
    return lambda x: functional.group_norm(x, groups, weight.at(x), bias.at(x), eps)


def instance_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Of the statistics of the input."""
    return functional.instance_norm(x, None, None, weight, bias, True, 0.0, eps)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As torch's, with its arguments by the names of the kernel."""
    return functional.group_norm(x, num_groups, weight, bias, eps)


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """With all that the kernel has."""
    out: Tensor = torch.ops.aten.elu(x, alpha, scale, input_scale)
    return out


def leaky_relu(x: Tensor, negative_slope: float, inplace: bool = False) -> Tensor:
    """Never in place: the kernel gives a new tensor too."""
    return functional.leaky_relu(x, negative_slope)


def matmul(x: Tensor, qb: Tensor) -> Tensor:
    """Of two quantized tensors."""
    return torch.matmul(x, qb)


# By type of module: what makes its function.
_MODULES: dict[type[nn.Module], Callable[[Any], Function]] = {
    nnq.BatchNorm2d: _batch_norm,
    nnq.BatchNorm3d: _batch_norm,
    nniq.BNReLU2d: partial(_batch_norm, relu=True),
    nniq.BNReLU3d: partial(_batch_norm, relu=True),
    nnq.InstanceNorm1d: _instance_norm,
    nnq.InstanceNorm2d: _instance_norm,
    nnq.InstanceNorm3d: _instance_norm,
    nnq.GroupNorm: _group_norm,
    nnq.Hardswish: lambda module: functional.hardswish,
    nnq.Sigmoid: lambda module: torch.sigmoid,
    nnq.ELU: lambda module: partial(elu, alpha=module.alpha),
    nnq.LeakyReLU: lambda module: partial(leaky_relu, negative_slope=module.negative_slope),
    nnq.Softmax: lambda module: partial(functional.softmax, dim=module.dim),
}
#: By op of torch.ops; settings have the names that they have in its schema.
FUNCTIONS: dict[Any, Function] = {
    torch.ops.quantized.hardswish: functional.hardswish,
    torch.ops.quantized.elu: elu,
    torch.ops.quantized.leaky_relu: leaky_relu,
    torch.ops.quantized.instance_norm: instance_norm,
    torch.ops.quantized.group_norm: group_norm,
    torch.ops.quantized.matmul: matmul,
}


def function_of(module: nn.Module) -> Function | None:
    """What a quantized module without a weight of its own computes; None where that is not known."""
    make = by_type(module, _MODULES)
    return None if make is None else make(module)


class _Own:
    """A parameter of the model, copied, which stays on each device where it was asked for."""

    def __init__(self, value: Tensor | None) -> None:
        self._value = None if value is None else value.detach().clone()
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, like: Tensor) -> Tensor | None:
        """On the device, and of the dtype, of another tensor."""
        place = like.device, like.dtype
        if self._value is not None and place not in self._copies:
            self._copies[place] = self._value.to(like)
        return self._copies.get(place)
