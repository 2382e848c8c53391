"""Ordinary torch functions on quantized values of the twin: what the quantized kernels do with their qparams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.errors import UnsupportedModelError
from cptv_ao.twin.functions import Clamp
from cptv_ao.twin.values import QTensor, straight_through_round

# Pure selections and reorderings of the codes.
_SHAPE = {
    "chunk", "clone", "contiguous", "detach", "expand", "flatten", "getitem", "narrow", "permute", "repeat", "reshape",
    "split", "squeeze", "transpose", "unbind", "unsqueeze", "view", "max_pool1d", "max_pool2d", "boolean_dispatch",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll", "relu", "relu_", "dropout", "Identity", "Dropout",
    "Flatten", "MaxPool1d", "MaxPool2d", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "ReLU",
    "repeat_interleave",
}  # fmt: skip
# Averages: computed on the codes and rounded to the same qparams.
_AVERAGES = {
    "avg_pool2d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "AvgPool2d", "AvgPool1d",
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "interpolate", "Upsample",
}  # fmt: skip
# Clamps to real values, which are rounded to the scale first: their ends where the call does not say otherwise.
_CLAMPS = {
    "relu6": (0.0, 6.0), "relu6_": (0.0, 6.0), "ReLU6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "hardtanh_": (-1.0, 1.0),
    "Hardtanh": (-1.0, 1.0), "clamp": (-math.inf, math.inf), "clamp_": (-math.inf, math.inf),
}  # fmt: skip
_PLAIN = {"getattr", "size", "dim", "numel", "shape"}
# Output qparams that the kernels fix: (scale, zero_point).
_FIXED: dict[str, tuple[Callable[[Tensor], Tensor], float, int]] = {
    "sigmoid": (torch.sigmoid, 1 / 256, 0),
    "Sigmoid": (torch.sigmoid, 1 / 256, 0),
    "hardsigmoid": (functional.hardsigmoid, 1 / 256, 0),
    "Hardsigmoid": (functional.hardsigmoid, 1 / 256, 0),
    "tanh": (torch.tanh, 2 / 256, 128),
    "Tanh": (torch.tanh, 2 / 256, 128),
}


def lifted(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; where an input is quantized, do to the codes what its kernel would do.

    Raises:
        UnsupportedModelError: the function is not known on quantized tensors.
    """
    first = args[0] if args else None
    if name in {"cat", "stack"} and isinstance(first, Sequence) and any(isinstance(v, QTensor) for v in first):
        return _concatenated(function, list(first), *args[1:], **kwargs)
    if not isinstance(first, QTensor):
        if any(isinstance(v, QTensor) for v in (*args, *kwargs.values())):
            raise UnsupportedModelError(f"the twin does not know {name} with a quantized second input", name)
        return function(*args, **kwargs)
    if name == "dequantize":
        return first.dequantize()
    if name in _PLAIN:
        return function(first.codes, *args[1:], **kwargs)
    if name in _SHAPE:
        return _wrapped(first, function(first.codes, *args[1:], **kwargs))
    if name == "mean":
        return _mean(function, first, *args[1:], **kwargs)
    if name in _AVERAGES:
        return first.fitted(function(first.codes, *args[1:], **kwargs))
    if name in _CLAMPS:
        low, high = _ends(name, function, *args[1:], **kwargs)
        return first.with_codes(Clamp.apply(first.codes, first.scale, low, high, first.limits()))
    if name in _FIXED:
        op, scale, zero_point = _FIXED[name]
        like = replace(first, scale=first.scale.new_tensor(scale), zero_point=first.scale.new_tensor(float(zero_point)))
        return like.fitted(op(first.dequantize()) / like.scale)
    raise UnsupportedModelError(f"the twin does not know {name} on a quantized tensor", name)


def _ends(name: str, function: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The real values that a clamp clamps to; arguments are those after the value."""
    low, high = _CLAMPS[name]
    if isinstance(function, nn.Module):
        return float(getattr(function, "min_val", low)), float(getattr(function, "max_val", high))
    if name.startswith("relu6"):
        return low, high
    given = {**dict(zip(("min", "max"), args, strict=False)), **{k.removesuffix("_val"): v for k, v in kwargs.items()}}
    ends = (given.get("min"), given.get("max"))
    if any(isinstance(end, Tensor) for end in ends):
        raise UnsupportedModelError(f"the twin does not know {name} with tensors as ends", name)
    return low if ends[0] is None else float(ends[0]), high if ends[1] is None else float(ends[1])


def _mean(function: Callable[..., Tensor], value: QTensor, dim: Any = None, *args: Any, **kwargs: Any) -> QTensor:
    """Means of small groups fall on ties: the kernel rounds codes over the last dimensions, floats over others."""
    rank = value.codes.dim()
    dims = sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank)))
    if dims != list(range(rank - len(dims), rank)):
        return value.fitted(function(value.dequantize(), dim, *args, **kwargs) * (1 / value.scale))
    codes = function(value.codes, *([] if dim is None else [dim]), *args, **kwargs)
    if value.rounding != "round":
        return value.with_codes(codes)
    return value.with_codes(straight_through_round(codes + value.zero_point) - value.zero_point)


def _concatenated(function: Callable[..., Tensor], values: list[QTensor], *args: Any, **kwargs: Any) -> QTensor:
    first = values[0]
    same = [v.codes if v.scale is first.scale else v.requantized(first).codes for v in values]
    return first.with_codes(function(same, *args, **kwargs))


def _wrapped(like: QTensor, result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(like.with_codes(part) for part in result)
    return like.with_codes(result)
