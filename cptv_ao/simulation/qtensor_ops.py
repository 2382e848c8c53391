"""Ordinary torch functions on quantized values of the twin: what the quantized kernels do with their qparams."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.fx.op_table import (
    CLAMP,
    DROPOUT,
    GETATTR,
    HARDSIGMOID,
    HARDTANH,
    MAX_POOL,
    RELU,
    RELU6,
    RESIZE,
    SIGMOID,
    TANH,
    Effect,
    Op,
)
from cptv_ao.simulation.autograd_ops import Clamp
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.qtensor import QTensor, straight_through_round

# The real values that clamps clamp to, where the call does not say otherwise.
_CLAMPS = {RELU6: (0.0, 6.0), HARDTANH: (-1.0, 1.0), CLAMP: (-math.inf, math.inf)}
# Output qparams that the kernels fix: (scale, zero_point).
_FIXED: dict[Op, tuple[Callable[[Tensor], Tensor], float, int]] = {
    SIGMOID: (torch.sigmoid, 1 / 256, 0),
    HARDSIGMOID: (functional.hardsigmoid, 1 / 256, 0),
    TANH: (torch.tanh, 2 / 256, 128),
}
# What a value can be asked for without its numbers.
_ATTRIBUTES = {"shape", "ndim", "device"}


class Requantizer(OutOfPlace):
    """Puts a quantized value on the scale of another one."""

    def forward(self, value: QTensor, like: QTensor) -> QTensor:
        return value.requantized(like)


class OnCodes(OutOfPlace):
    """A float function or module on values that may be quantized.

    Args:
        name: to tell of it.
        op: what it is; None where that is not known, so that its kernel is asked where values are quantized.

    Attributes:
        kernel: computes what is not known on quantized values, or not with these arguments; None as long as none is.
    """

    def __init__(self, name: str, op: Op | None, function: Callable[..., Any]) -> None:
        super().__init__()
        self._name, self._op, self.function = name, op, function
        self.kernel: ByKernel | None = None
        self.requantizer = Requantizer() if op is not None and op.effect == "joins" else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_quantized, (*args, *kwargs.values()))):
            return self.function(*args, **kwargs)
        try:
            return self._lifted(*args, **kwargs)
        except UnsupportedModelError:
            return self._by_kernel()(*args, **kwargs)

    def _by_kernel(self) -> ByKernel:
        if self.kernel is None:
            function = self.function
            own = copy.deepcopy(function).cpu() if isinstance(function, nn.Module) else function
            self.kernel = ByKernel(self._name, own, function)
        return self.kernel

    def _lifted(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # by its name, as torch has it
            first = "tensors" if "tensors" in kwargs else "input"
            args, kwargs = (kwargs[first],), {k: v for k, v in kwargs.items() if k != first}
        if self.requantizer is not None:
            args = (self._on_scale_of_first(args[0]), *args[1:])
        return lifted(self._op, self.function, *args, **kwargs)

    def _on_scale_of_first(self, values: Any) -> list[QTensor]:
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, QTensor) for value in values):
            raise UnsupportedModelError("it is known on a list of quantized values alone")
        assert self.requantizer is not None
        first = values[0]
        return [value if value.scale is first.scale else self.requantizer(value, first) for value in values]

    def extra_repr(self) -> str:
        return self._name


def lifted(op: Op | None, function: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """Do to the codes of a quantized value what the kernel of a function would do.

    Raises:
        UnsupportedModelError: the function is not known on quantized values, or not with these arguments.
    """
    if op is None or op.effect not in _LIFTS:
        raise UnsupportedModelError("it is not known on quantized values")
    alone = isinstance(value, QTensor) and not any(map(_is_quantized, (*args, *kwargs.values())))
    if not alone and op.effect not in _OF_SEVERAL:
        raise UnsupportedModelError("it is known on a quantized first input alone")
    return _LIFTS[op.effect](op, function, value, *args, **kwargs)


def _moved(op: Op, function: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """What selects and reorders codes; others of the values that are given tell a shape."""
    if not isinstance(value, QTensor) or any(isinstance(part, torch.dtype) for part in (*args, *kwargs.values())):
        raise UnsupportedModelError("it is known on a quantized first input alone, without another dtype")
    if op in _MOVES:
        return value.with_codes(_MOVES[op](function, value.codes, *args, **kwargs))
    codes, given, named = value.codes, [_codes(part) for part in args], {k: _codes(part) for k, part in kwargs.items()}
    result = function(codes, *given, **named)
    if op is MAX_POOL and not isinstance(result, Tensor):
        raise UnsupportedModelError("it is not known with return_indices=True")
    if isinstance(result, (tuple, list)):
        return type(result)(value.with_codes(part) for part in result)
    return value.with_codes(result)


def _rectified(_: Any, codes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return functional.relu(codes)


def _not_dropped(function: Any, codes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    training = False if isinstance(function, nn.Module) else kwargs.get("training", kwargs.get("train", True))
    if len(args) > 1:
        training = args[1]
    if training:
        raise UnsupportedModelError("it drops values even in eval mode (training=True)")
    return codes


def _resized(_: Any, codes: Tensor, *shape: Any, **settings: Any) -> Tensor:
    """The first of the codes in another shape."""
    wanted = torch.Size(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if settings or wanted.numel() > codes.numel():
        raise UnsupportedModelError("it is not known where it makes codes of nothing")
    return codes.flatten()[: wanted.numel()].reshape(wanted)


def _dequantized(op: Op, function: Any, value: QTensor, *args: Any, **kwargs: Any) -> Tensor:
    return value.dequantize()


def _asked(op: Op, function: Callable[..., Any], value: QTensor, *args: Any, **kwargs: Any) -> Any:
    return _attribute(value, *args) if op is GETATTR else function(value.codes, *args, **kwargs)


def _attribute(value: QTensor, name: str, *default: Any) -> Any:
    if name == "dtype":
        return torch.quint8 if value.low >= 0 else torch.qint8
    if name == "is_quantized":
        return True
    if name not in _ATTRIBUTES:
        raise UnsupportedModelError(f"the attribute {name} of a quantized value is not known")
    return getattr(value.codes, name, *default)


def _averaged(op: Op, function: Callable[..., Tensor], value: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    return value.fitted(function(value.codes, *args, **kwargs))


def _clamped(op: Op, function: Any, value: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    low, high = _ends(op, function, *args, **kwargs)
    return value.with_codes(Clamp.apply(value.codes, value.scale, low, high, value.limits()))


def _on_fixed_qparams(op: Op, function: Any, value: QTensor, *args: Any, **kwargs: Any) -> QTensor:
    if op not in _FIXED:
        raise UnsupportedModelError("it is not known on quantized values")
    compute, scale, zero_point = _FIXED[op]
    ends = value.scale.new_full((), scale), value.scale.new_full((), float(zero_point))
    like = replace(value, scale=ends[0], zero_point=ends[1])
    return like.fitted(compute(value.dequantize()) / like.scale)


def _ends(op: Op, function: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The real values that a clamp clamps to; arguments are those after the value."""
    low, high = _CLAMPS[op]
    if isinstance(function, nn.Module):
        return float(getattr(function, "min_val", low)), float(getattr(function, "max_val", high))
    if op is RELU6:
        return low, high
    given = {**dict(zip(("min", "max"), args, strict=False)), **{k.removesuffix("_val"): v for k, v in kwargs.items()}}
    ends = (given.get("min"), given.get("max"))
    if any(isinstance(end, Tensor) for end in ends):
        raise UnsupportedModelError("it is not known with tensors as ends")
    return low if ends[0] is None else float(ends[0]), high if ends[1] is None else float(ends[1])


def _mean(
    op: Op, function: Callable[..., Tensor], value: QTensor, dim: Any = None, *args: Any, **kwargs: Any
) -> QTensor:
    """Means of small groups fall on ties: the kernel rounds codes over the last dimensions, floats over others."""
    rank = value.codes.dim()
    dims = sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank)))
    if dims != list(range(rank - len(dims), rank)):
        return value.fitted(function(value.dequantize(), dim, *args, **kwargs) * (1 / value.scale))
    codes = function(value.codes, *([] if dim is None else [dim]), *args, **kwargs)
    if value.rounding != "round":
        return value.with_codes(codes)
    return value.with_codes(straight_through_round(codes + value.zero_point) - value.zero_point)


def _joined(op: Op, function: Callable[..., Tensor], values: list[QTensor], *args: Any, **kwargs: Any) -> QTensor:
    """Of values that are on one scale."""
    return values[0].with_codes(function([value.codes for value in values], *args, **kwargs))


def _codes(value: Any) -> Any:
    return value.codes if isinstance(value, QTensor) else value


def _is_quantized(value: Any) -> bool:
    """Whether there is a quantized value in an argument."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_quantized, value))
    return any(map(_is_quantized, value.values())) if isinstance(value, Mapping) else isinstance(value, QTensor)


# By what an op does to codes and qparams. All are given the op, its function, the value, and what it is called with.
_LIFTS: dict[Effect, Callable[..., Any]] = {
    "joins": _joined,
    "moves": _moved,
    "dequantizes": _dequantized,
    "asks": _asked,
    "mean": _mean,
    "averages": _averaged,
    "clamps": _clamped,
    "fixed": _on_fixed_qparams,
}
# Those that may be given more quantized values than the first.
_OF_SEVERAL: set[Effect] = {"joins", "moves"}
# What moves codes, and is not done by calling its function on them.
_MOVES: dict[Op, Callable[..., Tensor]] = {RELU: _rectified, RESIZE: _resized, DROPOUT: _not_dropped}
