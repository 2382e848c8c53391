"""What the twin calls in the place of a quantized module or function of a lowered graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import DEQUANTIZE, IDENTITY
from cptv_ao.fx.ops import of_module
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.quantized_ops import Quantized
from cptv_ao.simulation.calls import Call, told, unsupported
from cptv_ao.simulation.float_forms import dequantized
from cptv_ao.simulation.kernel_doubts import overwrites_what_is_read
from cptv_ao.simulation.modules import Norm, NormModule, Pointwise, QuantizedLayer, Sum, Times
from cptv_ao.simulation.pointwise import FUNCTIONS, function_of
from cptv_ao.simulation.products import Product, packed_product, product_of
from cptv_ao.simulation.qtensor_ops import OnCodes
from cptv_ao.simulation.quantized_arguments import bound
from cptv_ao.simulation.quantizers import Quantizer
from cptv_ao.simulation.scalar_ops import ScaledBy, ShiftedBy
from cptv_ao.simulation.site_modules import SiteModules

# The kernel's names of the arguments of quantized.layer_norm, and ours.
_NORM_NAMES = {"normalized_shape": "shape"}


class QuantizedCalls:
    """One small method per form of op. All raise `UnsupportedModelError` where they do not know one.

    Args:
        sites: makes the modules that hold qparams.
        qnnpack: whether QNNPACK's arithmetic is followed.

    Attributes:
        notes: where a kernel is in doubt.
    """

    def __init__(self, backend: Backend, sites: SiteModules, qnnpack: bool) -> None:
        self._backend, self._model, self._sites, self._qnnpack = backend, backend.model, sites, qnnpack
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        self._by_name = {node.name: node for node in self._model.graph.nodes}
        self._weight_of = {n: s.name for s in backend.sites.values() if s.kind == "weight" for n in s.nodes}
        self.notes: list[str] = []

    def of_module(self, node: Node, module: nn.Module, known: Quantized) -> Call:
        """Of a module that is in the table of quantized ones."""
        name = told(node, self._modules)
        if known.role == "static":
            return Call(self._layer(node, known, product_of(module), getattr(module, "negative_slope", 0)))
        if known.role == "dequantizes":
            return Call(OnCodes(name, DEQUANTIZE, torch.dequantize))
        if (own := dequantized(module)) is not None:
            return Call(OnCodes(name, of_module(own), own))
        if isinstance(module, nnq.LayerNorm):
            return Call(NormModule(self._output(node), module), node.args[:1])
        if isinstance(module, nnq.Quantize):
            return Call(self._output(node))
        if (op := function_of(module)) is not None:
            return Call(Pointwise(self._output(node), op))
        raise unsupported(node, name)

    def of_quantize(self, node: Node) -> Call:
        """Of `torch.quantize_per_tensor`, which does nothing where an equal form has the value on its scale already."""
        lead = self._backend.rewrites.passed.get(self._sites.activation(node.name) or "")
        source = node.args[0] if lead is None else self._by_name[self._backend.sites[lead].nodes[0]]
        quantizer = self._output(node)
        quantizer.passes = lead is not None
        return Call(quantizer, (source,))

    def of_function(self, node: Node, known: Quantized) -> Call:
        """Of an op of torch.ops that is in the table of quantized ones."""
        by_role: dict[str, Callable[[Node, Quantized], Call]] = {
            "binary": self._binary,
            "static": self._packed_layer,
            "scaled": self._scaled,
            "inherits": self._dropout,
        }
        if known.role not in by_role:
            raise unsupported(node, told(node, self._modules))
        return by_role[known.role](node, known)

    def _binary(self, node: Node, known: Quantized) -> Call:
        """quantized.add and mul, of two tensors or of one and a number, which may be first."""
        add = packet_of(node.target) in (torch.ops.quantized.add, torch.ops.quantized.add_relu)
        relu = known.after == "relu"
        values = tuple(part for part in node.args[:2] if isinstance(part, Node))
        numbers = [part for part in node.args[:2] if isinstance(part, (int, float))]
        output = self._sites.output(node.name)
        if output is not None and len(values) == 2 and len(node.args) == 4 and not node.kwargs:
            return Call(Sum(output, relu, self._qnnpack) if add else Times(output, relu), values)
        if len(values) == len(numbers) == 1 and len(node.args) == 2 and not node.kwargs:
            return Call((ShiftedBy if add else ScaledBy)(float(numbers[0]), relu), values)
        raise unsupported(node, told(node, self._modules))

    def _packed_layer(self, node: Node, known: Quantized) -> Call:
        """A functional linear or convolution: value, what is added, packed weight, scale, zero_point, slope."""
        inputs = 1 + known.adds
        packed = node.args[inputs]
        if not isinstance(packed, Node) or len(node.args) != inputs + 3:
            raise unsupported(node, told(node, self._modules))
        product = packed_product(fetch(self._model, str(packed.target)), packet_of(node.target))
        return Call(self._layer(node, known, product, 0.0), node.args[:inputs])

    def _scaled(self, node: Node, known: Quantized) -> Call:
        """What has an output scale and no packed weight."""
        packet = packet_of(node.target)
        if packet is not torch.ops.quantized.layer_norm and packet not in FUNCTIONS:
            raise unsupported(node, told(node, self._modules))
        value, settings = bound(node, self._model)
        if packet in FUNCTIONS:
            return Call(Pointwise(self._output(node), FUNCTIONS[packet]), (value,), settings)
        named = {_NORM_NAMES.get(name, name): setting for name, setting in settings.items()}
        return Call(Norm(self._output(node)), (value,), named)

    def _dropout(self, node: Node, known: Quantized) -> Call:
        """The one function that keeps the scale of its input, and does nothing in eval mode."""
        value, settings = bound(node, self._model)
        if settings.get("training", False):
            raise unsupported(node, "quantized.dropout with training=True")
        return Call(OnCodes(told(node, self._modules), IDENTITY, nn.Identity()), (value,))

    def _layer(self, node: Node, known: Quantized, product: Product, slope: float) -> QuantizedLayer:
        site, store = self._weight_of.get(node.name), self._backend.weights
        if site is None or not store.slot(site).is_right:
            raise unsupported(node, told(node, self._modules))
        if known.adds and overwrites_what_is_read(node, self._modules):
            self.notes.append(
                f"{node.name}: the kernel of {told(node, self._modules)} writes over what it adds, which is read "
                "elsewhere too: what the model computes there is in doubt, and the float twin computes what was meant"
            )
        behind: dict[str, Callable[[Tensor], Tensor]] = {
            "leaky_relu": partial(functional.leaky_relu, negative_slope=slope),
            "tanh": torch.tanh,
        }
        weight, output, bias = self._sites.weight(site), self._output(node), store.biases.given(site)
        relu = known.after == "relu"
        return QuantizedLayer(weight, output, bias, product, relu, self._qnnpack, behind.get(known.after))

    def _output(self, node: Node) -> Quantizer:
        """What puts the output of a node on its scale."""
        output = self._sites.output(node.name)
        if output is None:
            raise unsupported(node, told(node, self._modules))
        return output
