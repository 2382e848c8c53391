"""From a lowered graph to the float graph of the twin. Nodes keep their names.

Before: quantize_per_tensor(x, s, z) -> nnq.Linear -> quantized.add(a, b, s, z) -> dequantize
After:  Quantizer(x)                 -> QuantizedLayer   -> Sum(a, b)                 -> OnCodes(dequantize)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.ops import of_function, of_module, op_name, op_of
from cptv_ao.fx.paths import fetch, is_scalar
from cptv_ao.fx.producers import producer
from cptv_ao.fx.quantized_ops import Quantized, is_quantized_op, of_node, quantized_inside
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.float_forms import dequantized, float_form
from cptv_ao.simulation.modules import Norm, NormModule, Pointwise, QuantizedLayer, Quantizer, Sum, Times
from cptv_ao.simulation.pointwise import FUNCTIONS, function_of
from cptv_ao.simulation.products import Product, packed_product, product_of
from cptv_ao.simulation.qtensor_ops import OnCodes
from cptv_ao.simulation.scalar_ops import ScaledBy, ShiftedBy

# The kernel's names of the arguments of quantized.layer_norm, and ours.
_NORM_NAMES = {"normalized_shape": "shape"}
# Arguments of torch's average pools.
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


class LoweredBuilder(Builder):
    """One small method per form of op.

    Args:
        engine: the quantized engine whose arithmetic is followed; QNNPACK's differs from the others'.
        by_kernel: the nodes whose kernels are to compute.
    """

    def __init__(self, backend: Backend, engine: str, by_kernel: Collection[str] = ()) -> None:
        super().__init__(backend)
        self._by_kernel = by_kernel
        self._qnnpack = engine == "qnnpack"
        self._by_name = {node.name: node for node in self._model.graph.nodes}
        self._weight_of = {n: s.name for s in backend.sites.values() if s.kind == "weight" for n in s.nodes}

    def _add(self, node: Node) -> None:
        if node.name not in self._by_kernel:
            try:
                return self._add_known(node)
            except UnsupportedModelError:
                pass
        self._call(node, *self._kernel(node))

    def _add_known(self, node: Node) -> None:
        if node.op == "call_module":
            self._module(node, self._modules[str(node.target)])
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "call_method":
            self._lift(node, *self._method(node))
        else:
            self._copy(node)

    def _method(self, node: Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """The call of a method, out of place."""
        method, args, kwargs = self._pure(node)
        function = getattr(torch.Tensor, str(method), None)
        if function is None:
            raise self._unsupported(node, str(method))
        return function, args, kwargs

    def _module(self, node: Node, module: nn.Module) -> None:
        known, told = of_node(node, self._modules), type(module).__name__
        if known is None:
            if any(quantized_inside(str(node.target), module)):
                raise self._unsupported(node, told)
            # A float module sees quantized values too (ReLU, MaxPool2d): it is lifted like a function.
            own = _out_of_place(module)
            self._check_pool(node, vars(own))
            self._call(node, OnCodes(told, of_module(own), own))
        elif known.role == "static":
            self._call(node, self._weighted(node, known, product_of(module), getattr(module, "negative_slope", 0)))
        elif isinstance(module, nnq.LayerNorm):
            self._call(node, NormModule(self._output(node), module), node.args[:1])
        elif isinstance(module, nnq.Quantize):
            self._call(node, self._output(node))
        elif (op := function_of(module)) is not None:
            self._call(node, Pointwise(self._output(node), op))
        elif (own_float := dequantized(module)) is not None:
            self._call(node, OnCodes(told, of_module(own_float), own_float))
        elif known.role == "dequantizes":
            self._call(node, OnCodes(told, of_function(torch.dequantize), torch.dequantize))
        else:
            raise self._unsupported(node, told)

    def _kernel(self, node: Node) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The kernel of a node, which computes where the twin cannot, and what it is called with.

        Raises:
            UnsupportedModelError: the node calls nothing.
        """
        output = self._quantizer(self._activation[node.name]) if node.name in self._activation else None
        told, args, kwargs = self._told(node), node.args, dict(node.kwargs)
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            return ByKernel(told, module, float_form(module), output), args, kwargs
        if node.op not in ("call_function", "call_method"):
            raise self._unsupported(node, told)
        target: Any = node.target
        function = partial(_on_copy, getattr(torch.Tensor, target)) if node.op == "call_method" else target
        if output is None:
            return ByKernel(told, function, None if is_quantized_op(node) else function), args, kwargs
        given = dict(enumerate(args)) | kwargs
        scales = set(self._scales(given))
        if len(scales) != 2:
            raise self._unsupported(node, told)
        args = tuple(None if place in scales else value for place, value in enumerate(args))
        kwargs = {name: value for name, value in kwargs.items() if name not in scales}
        return ByKernel(told, function, None, output, self._scales(given)), args, kwargs

    def _weighted(self, node: Node, known: Quantized, product: Product, slope: float) -> QuantizedLayer:
        if node.name not in self._weight_of or not self._backend.weights.slot(self._weight_of[node.name]).is_right:
            raise self._unsupported(node, self._told(node))
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
        """oneDNN's kernel may write its output over what it adds (torch 2.14), which nothing else should read then."""
        nodes = list(self._model.graph.nodes)
        place = {other: index for index, other in enumerate(nodes)}
        root = producer(cast(Node, node.args[1]), (), self._modules)
        kin = [other for other in nodes if producer(other, (), self._modules) is root]
        if node.args[0] in kin or any(place[user] > place[node] for other in kin for user in other.users):
            self.notes.append(
                f"{node.name}: the kernel of {self._told(node)} writes over what it adds, which is read elsewhere too: "
                "what the model computes there is in doubt, and the float twin computes what was meant"
            )

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
        """quantized.add and mul, of two tensors or of one and a number, which may be first."""
        add = packet_of(node.target) in (torch.ops.quantized.add, torch.ops.quantized.add_relu)
        relu = known.after == "relu"
        values = [part for part in node.args[:2] if isinstance(part, Node)]
        numbers = [part for part in node.args[:2] if isinstance(part, (int, float))]
        if node.name in self._activation and len(values) == 2 and len(node.args) == 4 and not node.kwargs:
            output = self._output(node)
            self._call(node, Sum(output, relu, self._qnnpack) if add else Times(output, relu), tuple(values))
        elif len(values) == len(numbers) == 1 and len(node.args) == 2 and not node.kwargs:
            self._call(node, (ShiftedBy if add else ScaledBy)(float(numbers[0]), relu), tuple(values))
        else:
            raise self._unsupported(node, self._told(node))

    def _product(self, node: Node, known: Quantized) -> None:
        """A functional linear or convolution: value, what is added, packed weight, scale, zero_point, slope."""
        inputs = 1 + known.adds
        packed = node.args[inputs]
        if not isinstance(packed, Node) or len(node.args) != inputs + 3:
            raise self._unsupported(node, self._told(node))
        product = packed_product(fetch(self._model, str(packed.target)), packet_of(node.target))
        self._call(node, self._weighted(node, known, product, 0.0), node.args[:inputs])

    def _bound(self, node: Node) -> tuple[Any, dict[str, Any]]:
        """The value that a quantized function is given, and its other arguments but the output's qparams, by name."""
        target: Any = node.target
        overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
        names = [argument.name for argument in overload._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        scales = self._scales(given)
        return given.pop(names[0]), {name: value for name, value in given.items() if name not in scales}

    def _scales(self, given: Mapping[Any, Any]) -> list[Any]:
        """Where among the arguments of a quantized function the scale and the zero_point of its output are."""
        held = {place: self._constant(value) for place, value in given.items()}
        kinds = (True, False)
        return [place for kind in kinds for place, value in held.items() if is_scalar(value, floating=kind)]

    def _constant(self, value: Any) -> Any:
        """What a node of the model itself stands for; None of others."""
        return fetch(self._model, str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None

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


def _out_of_place(module: nn.Module) -> nn.Module:
    """A copy of a float module that writes into none of its inputs."""
    own = copy.deepcopy(module)
    for part in own.modules():
        if hasattr(part, "inplace"):
            cast(Any, part).inplace = False
    return own


def _on_copy(method: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of a tensor, which may work in place, on a copy of it."""
    return method(value.clone() if isinstance(value, Tensor) else value, *args, **kwargs)


_IDENTITY = of_module(nn.Identity())
