"""From a lowered graph to the float graph of the twin. Nodes keep their names.

Before: quantize_per_tensor(x, s, z) -> nnq.Linear -> quantized.add(a, b, s, z) -> dequantize
After:  Quantizer(x)                 -> QuantizedLayer   -> Sum(a, b)                 -> OnCodes(dequantize)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.ops import by_type, of_function, of_module, op_name, op_of
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.producers import producer
from cptv_ao.fx.quantized_ops import Quantized, is_quantized_op, of_node, quantized_inside
from cptv_ao.simulation.autograd_ops import Convolution, Line, Linear, Product
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.modules import Norm, NormModule, Pointwise, QuantizedLayer, Quantizer, ScaledBy, Sum, Times
from cptv_ao.simulation.pointwise import FUNCTIONS, function_of
from cptv_ao.simulation.qtensor_ops import OnCodes

# The kernel's names of the arguments of quantized.layer_norm, and ours.
_NORM_NAMES = {"normalized_shape": "shape"}
# Arguments of torch's average pools.
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_OUTPUT = ("output_scale", "output_zero_point")


class LoweredBuilder(Builder):
    """One small method per form of op.

    Args:
        engine: the quantized engine whose arithmetic is followed; QNNPACK's differs from the others'.
    """

    def __init__(self, backend: Backend, engine: str) -> None:
        super().__init__(backend)
        self._qnnpack = engine == "qnnpack"
        self._by_name = {node.name: node for node in self._model.graph.nodes}
        self._weight_of = {n: s.name for s in backend.sites.values() if s.kind == "weight" for n in s.nodes}

    def _add(self, node: Node) -> None:
        if node.op == "call_module":
            self._module(node, self._modules[str(node.target)])
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "call_method":
            method, args, kwargs = self._pure(node)
            function = getattr(torch.Tensor, method, None)
            if function is None:
                raise self._unsupported(node, method)
            self._lift(node, function, args, kwargs)
        else:
            self._copy(node)

    def _module(self, node: Node, module: nn.Module) -> None:
        known, told = of_node(node, self._modules), type(module).__name__
        if known is None:
            if inside := list(quantized_inside(str(node.target), module)):
                raise self._unsupported(node, f"{told}, for what is quantized in it: {', '.join(inside)}")
            # A float module sees quantized values too (ReLU, MaxPool2d): it is lifted like a function.
            own = copy.deepcopy(module)
            for part in own.modules():
                if hasattr(part, "inplace"):
                    cast(Any, part).inplace = False
            self._check_pool(node, vars(own))
            self._call(node, OnCodes(told, of_module(own), own))
        elif known.role == "static":
            self._call(node, self._weighted(node, known, _module_product(module), getattr(module, "negative_slope", 0)))
        elif isinstance(module, nnq.LayerNorm):
            self._call(node, NormModule(self._output(node), module), node.args[:1])
        elif isinstance(module, nnq.Quantize):
            self._call(node, self._output(node))
        elif (op := function_of(module)) is not None:
            self._call(node, Pointwise(self._output(node), op))
        elif (lifted := by_type(module, _FLOAT)) is not None and (own_float := lifted(module)) is not None:
            self._call(node, OnCodes(told, of_module(own_float), own_float))
        elif known.role == "dequantizes":
            self._call(node, OnCodes(told, of_function(torch.dequantize), torch.dequantize))
        else:
            raise self._unsupported(node, told)

    def _weighted(self, node: Node, known: Quantized, product: Product | None, slope: float) -> QuantizedLayer:
        if product is None or node.name not in self._weight_of:
            raise self._unsupported(node, f"{self._told(node)} with these settings")
        if known.adds:
            self._check_added(node)
        behind: dict[str, Callable[[Tensor], Tensor]] = {
            "leaky_relu": partial(functional.leaky_relu, negative_slope=slope),
            "tanh": torch.tanh,
        }
        site, relu = self._weight_of[node.name], known.after == "relu"
        weight, output, bias = self._weight(site), self._output(node), self._backend.weights.bias(site)
        return QuantizedLayer(weight, output, bias, product, relu, self._qnnpack, behind.get(known.after))

    def _check_added(self, node: Node) -> None:
        """oneDNN's kernel may write its output over what it adds (torch 2.14), so nothing else may read that."""
        nodes = list(self._model.graph.nodes)
        place = {other: index for index, other in enumerate(nodes)}
        root = producer(cast(Node, node.args[1]), (), self._modules)
        kin = [other for other in nodes if producer(other, (), self._modules) is root]
        if node.args[0] in kin or any(place[user] > place[node] for other in kin for user in other.users):
            told = f"{self._told(node)} where what is added is read elsewhere too: its kernel overwrites that"
            raise self._unsupported(node, told)

    def _function(self, node: Node) -> None:
        known = of_node(node, self._modules)
        if node.target is torch.quantize_per_tensor:
            lead = self._backend.rewrites.passed.get(self._activation.get(node.name, ""))
            source = node.args[0] if lead is None else self._by_name[self._backend.sites[lead].nodes[0]]
            quantizer = self._output(node)
            quantizer.passes = lead is not None
            self._call(node, quantizer, (source,))
        elif known is not None:
            self._quantized_function(node, known)
        elif is_quantized_op(node):
            raise self._unsupported(node, self._told(node))
        else:
            self._lift(node, *self._pure(node))

    def _quantized_function(self, node: Node, known: Quantized) -> None:
        packet = packet_of(node.target)
        if known.role == "binary":
            self._binary(node, known)
        elif known.role == "static":
            self._product(node, known)
        elif packet is torch.ops.quantized.layer_norm:
            value, settings = self._bound(node)
            self._call(
                node, Norm(self._output(node)), (value,), {_NORM_NAMES.get(k, k): v for k, v in settings.items()}
            )
        elif packet in FUNCTIONS:
            value, settings = self._bound(node)
            self._call(node, Pointwise(self._output(node), FUNCTIONS[packet]), (value,), settings)
        elif packet is torch.ops.quantized.dropout:
            value, settings = self._bound(node)
            if settings.get("training", False):
                raise self._unsupported(node, "quantized.dropout with training=True")
            self._call(node, OnCodes(self._told(node), _IDENTITY, nn.Identity()), (value,))
        else:
            raise self._unsupported(node, self._told(node))

    def _binary(self, node: Node, known: Quantized) -> None:
        """quantized.add and mul, of two tensors or of one and a number."""
        add = packet_of(node.target) in (torch.ops.quantized.add, torch.ops.quantized.add_relu)
        relu = known.after == "relu"
        values = [part for part in node.args[:2] if isinstance(part, Node)]
        numbers = [part for part in node.args[:2] if isinstance(part, (int, float))]
        if node.name in self._activation and len(values) == 2 and len(node.args) == 4 and not node.kwargs:
            output = self._output(node)
            self._call(node, Sum(output, relu, self._qnnpack) if add else Times(output, relu), tuple(values))
        elif not add and len(values) == len(numbers) == 1 and len(node.args) == 2 and not node.kwargs:
            self._call(node, ScaledBy(float(numbers[0]), relu), tuple(values))
        else:
            raise self._unsupported(node, self._told(node))

    def _product(self, node: Node, known: Quantized) -> None:
        """A functional linear or convolution: value, what is added, packed weight, scale, zero_point, slope."""
        inputs = 1 + known.adds
        packed = node.args[inputs]
        if not isinstance(packed, Node) or len(node.args) != inputs + 3:
            raise self._unsupported(node, self._told(node))
        line = packet_of(node.target) in (torch.ops.quantized.conv1d, torch.ops.quantized.conv1d_relu)
        product = _packed_product(fetch(self._model, str(packed.target)), line)
        self._call(node, self._weighted(node, known, product, 0.0), node.args[:inputs])

    def _bound(self, node: Node) -> tuple[Any, dict[str, Any]]:
        """The value that a quantized function is given, and its other arguments but the output's qparams, by name."""
        packet: Any = packet_of(node.target)
        names = [argument.name for argument in packet.default._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        return given.pop(names[0]), {name: value for name, value in given.items() if name not in _OUTPUT}

    def _check_pool(self, node: Node, settings: Mapping[str, Any]) -> None:
        """QNNPACK's average pools divide by the whole window, whatever is asked for (torch 2.14)."""
        op = op_of(node, self._modules)
        if not self._qnnpack or op is None or op.name != "avg_pool" or settings.get("ceil_mode", False):
            return
        padded = settings.get("padding", 0) not in (0, (0,), (0, 0), [0, 0])
        if settings.get("divisor_override") is not None or (padded and not settings.get("count_include_pad", True)):
            raise self._unsupported(node, f"{self._told(node)} of QNNPACK with these settings")

    def _lift(self, node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_pool(node, dict(zip(_POOL, node.args, strict=False)) | node.kwargs)
        if node.all_input_nodes:
            self._call(node, OnCodes(op_name(node), op_of(node, self._modules), function), args, kwargs)
        else:
            self._copy(node)

    def _output(self, node: Node) -> Quantizer:
        """What puts the output of a node on its scale."""
        if node.name not in self._activation:
            raise self._unsupported(node, self._told(node))
        return self._quantizer(self._activation[node.name])


def _module_product(module: nn.Module) -> Product | None:
    """Of a quantized module with a weight; None where its settings are not known."""
    owner = cast(Any, module)
    if isinstance(module, nnq.Linear):
        return Linear()
    if owner.transposed or owner.padding_mode != "zeros":
        return None
    rank = len(owner.kernel_size)
    stride, padding, dilation = (_each(getattr(owner, k), rank) for k in ("stride", "padding", "dilation"))
    return Convolution(stride, padding, dilation, owner.groups)


def _packed_product(packed: Any, line: bool) -> Product | None:
    """Of a packed weight, of a convolution of one dimension or another; None where its settings are not known."""
    if not hasattr(packed, "stride"):
        return Linear()
    if packed.transpose():
        return None
    stride, padding, dilation = tuple(packed.stride()), tuple(packed.padding()), tuple(packed.dilation())
    return (Line if line else Convolution)(stride, padding, dilation, packed.groups())


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def _linear(module: Any) -> nn.Module:
    """The float module that computes with the weight of a dynamic one."""
    weight, bias = module._weight_bias()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).requires_grad_(False)
    linear.weight.copy_(weight.dequantize())
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def _embedding(module: Any) -> nn.Module:
    weight = module.weight().dequantize()
    return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight, _freeze=True)


_IDENTITY = of_module(nn.Identity())
# By type of quantized module: the float one that does the same, or computes with its weight.
_FLOAT: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nnqd.Linear: _linear,
    nniqd.LinearReLU: lambda module: nn.Sequential(_linear(module), nn.ReLU()),
    nnq.Embedding: _embedding,
    nnq.Dropout: lambda module: nn.Identity(),
    nnq.ReLU6: lambda module: nn.ReLU6(),
}
