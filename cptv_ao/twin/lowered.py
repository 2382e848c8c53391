"""From a lowered graph to the float graph of the twin. Nodes keep their names.

Before: quantize_per_tensor(x, s, z) -> nnq.Linear -> quantized.add(a, b, s, z) -> dequantize
After:  Quantizer(x)                 -> Weighted   -> Sum(a, b)                 -> lifted("dequantize")
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.errors import UnsupportedModelError
from cptv_ao.scopes import fetch
from cptv_ao.twin.builder import Builder
from cptv_ao.twin.functions import Convolution, Linear, Product
from cptv_ao.twin.lift import lifted
from cptv_ao.twin.modules import (
    Norm,
    NormModule,
    Pointwise,
    Quantizer,
    ScaledBy,
    Sum,
    Times,
    Weighted,
)

_POINTWISE_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "hardswish": functional.hardswish,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
}
# The kernel's names of the arguments of quantized.layer_norm, and ours.
_NORM_NAMES = {"normalized_shape": "shape", "input": "value"}


class LoweredBuilder(Builder):
    """One small method per form of op.

    Args:
        engine: the quantized engine whose arithmetic is followed; QNNPACK's differs from the others'.
    """

    def __init__(self, backend: Backend, engine: str) -> None:
        super().__init__(backend)
        self._qnnpack = engine == "qnnpack"
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        self._by_name = {node.name: node for node in self._model.graph.nodes}
        self._weight_of = {n: s.name for s in backend.sites.values() if s.kind == "weight" for n in s.nodes}

    def _add(self, node: Node) -> None:
        if node.op == "call_module":
            self._call(node, self._module(node, self._modules[str(node.target)]))
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "call_method":
            method, args, kwargs = self._pure(node)
            self._lift(node, method, getattr(torch.Tensor, method), args, kwargs)
        else:
            self._copy(node)

    def _module(self, node: Node, module: nn.Module) -> nn.Module:
        kind = type(module)
        if ".quantized" not in kind.__module__:
            # A float module sees quantized values too (ReLU, MaxPool2d): it is lifted like a function.
            own = copy.deepcopy(module)
            for part in own.modules():
                if hasattr(part, "inplace"):
                    cast(Any, part).inplace = False
            return Lift(kind.__name__, own)
        if ".dynamic" in kind.__module__ or kind.__name__ == "Embedding":
            return Lift(kind.__name__, _weight_only(module))
        if node.name in self._weight_of:
            return self._weighted(node, _product_of(module), "ReLU" in kind.__name__)
        if node.name in self._activation and kind.__name__ == "LayerNorm":
            return NormModule(self._output(node), module)
        if node.name in self._activation:
            return Pointwise(self._output(node), _float_op(module))
        return Lift(kind.__name__ if kind.__name__ != "Dropout" else "Identity", nn.Identity())

    def _weighted(self, node: Node, product: Product, relu: bool) -> Weighted:
        site = self._weight_of[node.name]
        bias = self._backend.bias(site)
        return Weighted(self._weight(site), self._output(node), bias, product, relu, self._qnnpack)

    def _function(self, node: Node) -> None:
        target = node.target
        if target is torch.quantize_per_tensor:
            lead = self._backend.passed.get(self._activation.get(node.name, ""))
            source = node.args[0] if lead is None else self._by_name[self._backend.sites[lead].nodes[0]]
            quantizer = self._output(node)
            quantizer.passes = lead is not None
            self._call(node, quantizer, (source,))
        elif isinstance(target, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
            packet = getattr(target, "overloadpacket", target)
            self._quantized_function(node, str(packet).split(".")[-1])
        else:
            function, args, kwargs = self._pure(node)
            name = "getitem" if function is operator.getitem else getattr(function, "__name__", str(function))
            self._lift(node, name, function, args, kwargs)

    def _quantized_function(self, node: Node, name: str) -> None:
        relu = name.endswith("_relu")
        base = name.removesuffix("_relu")
        if base in {"add", "mul"} and node.name not in self._activation:
            if base == "add" or not isinstance(node.args[1], (int, float)):
                raise self._unsupported(node, name)
            self._call(node, ScaledBy())
            return
        output = self._output(node)
        if base in {"add", "mul"}:
            op = Sum(output, relu, self._qnnpack) if base == "add" else Times(output, relu)
            self._call(node, op, node.args[:2])
        elif base == "layer_norm":
            kwargs = {k: v for k, v in node.kwargs.items() if not k.startswith("output_")}
            self._call(node, Norm(output), node.args, {_NORM_NAMES.get(k, k): v for k, v in kwargs.items()})
        elif base in _POINTWISE_FUNCTIONS:
            self._call(node, Pointwise(output, _POINTWISE_FUNCTIONS[base]), node.args[:1])
        elif node.name in self._weight_of:
            packed = next(n for n in node.all_input_nodes if n.op == "get_attr" and "packed_weight" in str(n.target))
            product = _packed_product(fetch(self._model, str(packed.target)))
            self._call(node, self._weighted(node, product, relu), node.args[:1])
        else:
            raise self._unsupported(node, name)

    def _lift(
        self, node: Node, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if node.all_input_nodes:
            self._call(node, Lift(name, function), args, kwargs)
        else:
            self._copy(node)

    def _output(self, node: Node) -> Quantizer:
        """What puts the output of a node on its scale."""
        if node.name not in self._activation:
            raise self._unsupported(node, str(node.target))
        return self._quantizer(self._activation[node.name])

    def _unsupported(self, node: Node, op: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{node.name}: the float twin does not know {op}", node.name)


class Lift(nn.Module):
    """A float function or module on values that may be quantized."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self._name, self.function = name, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return lifted(self._name, self.function, *args, **kwargs)


def _product_of(module: nn.Module) -> Product:
    owner = cast(Any, module)
    if not hasattr(module, "stride"):
        return Linear()
    if getattr(module, "transposed", False) or getattr(module, "padding_mode", "zeros") != "zeros":
        raise UnsupportedModelError(f"the float twin does not know {type(module).__name__} with these settings")
    rank = len(owner.kernel_size)
    stride, padding, dilation = (_each(getattr(owner, k), rank) for k in ("stride", "padding", "dilation"))
    return Convolution(stride, padding, dilation, owner.groups)


def _packed_product(packed: Any) -> Product:
    if not hasattr(packed, "stride"):
        return Linear()
    return Convolution(tuple(packed.stride()), tuple(packed.padding()), tuple(packed.dilation()), packed.groups())


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def _float_op(module: nn.Module) -> Callable[..., Tensor]:
    """The float computation of a quantized module without a weight of its own."""
    owner, name = cast(Any, module), type(module).__name__
    if name in {"BatchNorm2d", "BatchNorm3d", "BNReLU2d", "BNReLU3d"}:
        stats = [_own(getattr(owner, k)) for k in ("running_mean", "running_var", "weight", "bias")]

        def batch_norm(x: Tensor) -> Tensor:
            mean, var, weight, bias = (s.to(x) for s in stats)
            out = functional.batch_norm(x, mean, var, weight, bias, False, 0.0, owner.eps)
            return functional.relu(out) if "ReLU" in name else out

        return batch_norm
    simple: dict[str, Callable[..., Tensor]] = {
        "Hardswish": functional.hardswish,
        "Sigmoid": torch.sigmoid,
        "ELU": partial(functional.elu, alpha=getattr(owner, "alpha", 1.0)),
        "LeakyReLU": partial(functional.leaky_relu, negative_slope=getattr(owner, "negative_slope", 0.01)),
        "Softmax": partial(functional.softmax, dim=getattr(owner, "dim", -1)),
    }
    if name in simple:
        return simple[name]
    raise UnsupportedModelError(f"the float twin does not know the quantized module {name}", name)


def _weight_only(module: nn.Module) -> nn.Module:
    """The float module that computes with the weight of one that quantizes nothing else at rest."""
    owner, name = cast(Any, module), type(module).__name__
    if name == "Embedding":
        weight = owner.weight().dequantize()
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)
    if name != "Linear":
        raise UnsupportedModelError(f"the float twin does not know the dynamic module {name}", name)
    weight, bias = owner._weight_bias()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).requires_grad_(False)
    linear.weight.copy_(weight.dequantize())
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def _own(value: Tensor) -> Tensor:
    return value.detach().clone()
