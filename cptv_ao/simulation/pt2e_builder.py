"""From a PT2E graph to the graph of the twin. Nodes keep their names; aten ops stay what they are.

Before: quantize_per_tensor(x, s, z) -> dequantize_per_tensor -> aten.linear(x, dequantize_per_channel(w, ...), b)
After:  Quantizer(x)                 -> Dequantize            -> FloatLayer(x, b), which rounds its weight
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_unflatten

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.pt2e import weight_sites
from cptv_ao.core.output_tree import children
from cptv_ao.fx.decomposed_ops import is_decomposed
from cptv_ao.fx.inplace import OutOfPlace
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.by_kernel import PassedOn
from cptv_ao.simulation.calls import pure
from cptv_ao.simulation.products import Convolution, Linear
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.quantizers import WeightQuantizer
from cptv_ao.simulation.weighted_layer import WeightedLayer

_aten = torch.ops.aten
_CONVOLUTIONS = {_aten.conv1d.default: 1, _aten.conv2d.default: 2, _aten.conv3d.default: 3}


class Dequantize(OutOfPlace):
    """The values of quantized ones."""

    def forward(self, value: QTensor) -> Tensor:
        return value.dequantize()


class Rounded(OutOfPlace):
    """A value as an op gives it back that was quantized with a scale of its own at run time."""

    def __init__(self, dequantize: Any) -> None:
        super().__init__()
        self._dequantize = dequantize

    def forward(self, value: Tensor, *given: Any) -> Tensor:
        with torch.no_grad():  # what chooses the scale may have no derivative (aminmax of torch 2.11)
            other = self._dequantize(*given)
        rounded: Tensor = PassedOn.apply(value, other)
        return rounded


class DequantizedWeight(OutOfPlace):
    """A weight on its scale, as a float tensor."""

    def __init__(self, weight: WeightQuantizer) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight.dequantize()


class FloatLayer(WeightedLayer):
    """A float linear or convolution whose weight is on a scale."""

    def __init__(self, weight: WeightQuantizer, product: Linear | Convolution) -> None:
        super().__init__(weight, product)
        self._settings = None if isinstance(product, Linear) else product.settings

    def forward(self, value: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = self.weight.corrected(bias)
        if self._settings is None:
            return nn.functional.linear(value, self.weight.dequantize(), bias)
        return torch.convolution(value, self.weight.dequantize(), bias, *self._settings)


class _OutputForm(nn.Module):
    """Puts the values of a graph into what the model returns: a dataclass, an object of the user's."""

    def __init__(self, form: TreeSpec) -> None:
        super().__init__()
        self._form = form

    def forward(self, values: Sequence[Any]) -> Any:
        return tree_unflatten(list(values), self._form)


def _is_plain(output: Any) -> bool:
    """Whether it is made of tuples, lists and dicts."""
    parts = children(output)
    if parts is None:
        return True
    plain = type(output) in {tuple, list, dict} or hasattr(output, "_fields")
    return plain and all(_is_plain(part) for _, part in parts)


class Pt2eBuilder(Builder):
    """From the backend of a PT2E graph."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        # Codes that are not searched stay as the graph has them.
        found = weight_sites(backend.model, backend.sites)
        self._weight_of = {node: site for node, site in found.items() if backend.weight(site).is_quantized}

    def _add(self, node: Node) -> None:
        if node.op == "output":
            self._output(node)
        elif node.op == "call_function":
            self._function(node)
        elif node.op != "call_module":  # guards of the export: nothing depends on them
            self._copy(node)

    def _output(self, node: Node) -> None:
        """In the form in which the model returns its values."""
        flat, codegen = self._mapped(node.args[0]), copy.copy(self._model.graph._codegen)
        if not hasattr(codegen, "pytree_info"):
            self._graph.output(flat)
            return
        info = cast(Any, codegen).pytree_info
        output = tree_unflatten(flat, info.out_spec)
        if not _is_plain(output):  # which no graph can write down
            self._owned["output_form"] = _OutputForm(info.out_spec)
            output = self._graph.create_node("call_module", "output_form", (flat,))
        self._graph.output(output)
        cast(Any, codegen).pytree_info = info._replace(out_spec=None)
        self._graph.set_codegen(codegen)  # takes nested inputs apart

    def _function(self, node: Node) -> None:
        quantizer, product = self._sites.output(node.name), self._product(node)
        if quantizer is not None:
            self._call(node, quantizer, node.args[:1])
        elif node.name in self._weight_of:
            self._call(node, DequantizedWeight(self._sites.weight(self._weight_of[node.name])), ())
        elif is_decomposed(node):
            self._add_quantization(node)
        elif product is not None:
            value, weight, *rest = node.args
            site = self._weight_of[cast(Node, weight).name]
            biases = self._backend.weights.biases
            if (given := biases.given(site)) is not None and biases.correction(site) is not None:
                self._instead[str(cast(Node, rest[0]).target)] = given  # the layer adds the correction to it
            self._call(node, FloatLayer(self._sites.weight(site), product), (value, *rest[:1]))
        else:
            self._float_function(node)

    def _float_function(self, node: Node) -> None:
        self._copy(node)
        new = self.nodes[node.name]
        new.target, args, kwargs = pure(node, None)
        new.args, new.kwargs = self._mapped(args), self._mapped(kwargs)

    def _add_quantization(self, node: Node) -> None:
        """A node beside those of the sites: dynamic quantization is run as it is, and the gradient of what it rounds
        passes as if nothing happened."""
        source = node.args[0]
        if self._sites.activation(_name(source)) is not None:
            self._call(node, Dequantize(), node.args[:1])
        elif node.users and all(user.name in self._weight_of for user in node.users):
            return  # puts a weight on its scale: its dequantize nodes stand for that
        elif isinstance(source, Node) and source.args and is_decomposed(source):
            self._call(node, Rounded(node.target), (source.args[0], *node.args))
        else:
            self._copy(node)

    def _product(self, node: Node) -> Linear | Convolution | None:
        """The linear or convolution that a node is, where its weight is a site."""
        weight = node.args[1] if len(node.args) > 1 else None
        if not isinstance(weight, Node) or weight.name not in self._weight_of or node.kwargs:
            return None
        if node.target is _aten.linear.default:
            return Linear()
        if node.target not in _CONVOLUTIONS:
            return None
        rank = _CONVOLUTIONS[node.target]  # type: ignore[index]
        given: list[Any] = [*node.args[3:], *([1], [0], [1], 1)[max(0, len(node.args) - 3) :]]
        stride, padding, dilation = (tuple(v) * (rank // len(v)) for v in given[:3])
        return Convolution(stride, padding, dilation, given[3])


def _name(value: Any) -> str:
    return value.name if isinstance(value, Node) else ""
