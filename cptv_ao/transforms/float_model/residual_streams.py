"""Residual streams of a float model: values of one width that layers write into, sums carry on, and norms read.

x = patches(image) + position        written by a layer and by a tensor of the model
x = x + proj(attention(norm(x)))     a sum; read by a norm, and by the linear layers behind it
return head(norm(x))
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional

from cptv_ao.fx.op_table import IDENTITY
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.readers import own_path, read_once, reads
from cptv_ao.transforms.float_model.example_runs import tensors_of
from cptv_ao.transforms.float_model.smooth_quant import norm_parameters, shared

_SUMS = {operator.add, operator.iadd, torch.add}
_PRODUCTS = {operator.mul, operator.imul, torch.mul}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = ("input", "weight", "bias")


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution: its own tensors, (O, K, ...) and (O,), and its module, if it is one."""

    weight: Tensor
    bias: Tensor | None
    module: nn.Module | None

    @property
    def is_linear(self) -> bool:
        """Whether it reads the last dimension."""
        return self.weight.dim() == 2


@dataclass(frozen=True)
class Writer:
    """A layer that writes into a stream; `factors` (O,): what its channels are multiplied by then (LayerScale)."""

    layer: Layer
    factors: Tensor | None = None


@dataclass(frozen=True)
class Reader:
    """What reads a stream.

    Attributes:
        norm: weight and bias of the norm that does; None where linear layers do.
        layers: the linear layers that read it, or the norm, as nothing else does; none where the model returns it.
        end: where there are none: path of the norm, or of the last identity behind it.
    """

    norm: tuple[Tensor, Tensor | None] | None
    layers: tuple[Layer, ...]
    end: str


@dataclass(frozen=True)
class ResidualStream:
    """Values (..., width), each a sum of what `writers` and `tensors` (..., width) give.

    Attributes:
        sums: nodes of the graph that give them.
    """

    width: int
    writers: tuple[Writer, ...]
    tensors: tuple[Tensor, ...]
    readers: tuple[Reader, ...]
    sums: tuple[Node, ...]


@dataclass
class _Values:
    """Nodes that give the same channels, what makes these, and what reads them; `closed` where something else does."""

    nodes: list[Node]
    writers: list[Writer] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    returned: bool = False
    closed: bool = False

    def take(self, other: _Values) -> None:
        """Be those of another, too."""
        for name, value in vars(self).items():
            own, more = value, getattr(other, name)
            setattr(self, name, own or more if isinstance(own, bool) else own + more)


class ResidualStreams:
    """Finds them in a model.

    Args:
        model: in float.
        graph: as traced from it.
        shown: what the nodes of the graph gave on example images.
    """

    def __init__(self, model: nn.Module, graph: Graph, shown: Mapping[Node, Any]) -> None:
        self._model, self._graph, self._shown = model, graph, shown
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._once = read_once(graph.nodes)
        # Of the model itself; constants that tracing has made are not.
        held = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._tensors: dict[str | None, Tensor] = dict(held)
        self._values: dict[Node, _Values] = {}

    def find(self) -> list[ResidualStream]:
        """In graph order."""
        for node in self._graph.nodes:
            self._join(node)
        every = {id(values): values for values in self._values.values()}
        found = [self._made(values) for values in every.values()]
        return [stream for stream in found if stream is not None]

    def _join(self, node: Node) -> None:
        """Put a node to the values that it is one of, and to those that it reads."""
        own, inputs = _Values([node]), node.all_input_nodes
        self._values[node] = own
        layer, tensor = self._layer(node), self._tensor(node)
        if layer is not None:
            own.writers.append(Writer(layer))
            source = self._values[inputs[0]]
            source.layers.append(layer)
            source.closed |= not layer.is_linear
        elif norm_parameters(node, self._model, self._modules, self._once) is not None:
            own.norms.append(node)
            self._values[inputs[0]].readers.append(node)
        elif tensor is not None:
            own.tensors.append(tensor)
        elif (scaled := self._scaled(node, inputs)) is not None:
            own.writers.append(scaled)
        elif self._keeps_channels(node):
            own.sums += [node] if node.target in _SUMS else []
            for value in inputs:
                if tensors_of(self._shown.get(value)):  # not a size
                    self._unite(value, node)
        elif node.op == "output":
            for value in inputs:
                self._values[value].returned = True
        elif reads(node):
            for value in (node, *inputs):
                self._values[value].closed = True

    def _layer(self, node: Node) -> Layer | None:
        """The layer that a node is, with tensors that nothing else has."""
        if node.op == "call_module":
            module: Any = self._modules[str(node.target)]
            plain = type(module) is nn.Linear or (type(module) in _CONVOLUTIONS and module.groups == 1)
            if not plain or str(node.target) not in self._once or shared(module, self._modules):
                return None
            return Layer(module.weight, module.bias, module)
        if node.target is not functional.linear:
            return None
        given = dict(zip(_LINEAR, node.args, strict=False)) | node.kwargs
        weight, bias = (self._own(given.get(name)) for name in ("weight", "bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            return None
        return Layer(weight, bias, None)

    def _tensor(self, node: Node) -> Tensor | None:
        """The tensor of the model that a node is, or has its rows from, and nothing else has."""
        if node.op == "call_module":
            module: Any = self._modules[str(node.target)]
            rows = type(module) is nn.Embedding and module.max_norm is None and str(node.target) in self._once
            return module.weight if rows and not shared(module, self._modules) else None
        held = self._own(node)
        return held if held is not None and held.is_floating_point() else None

    def _own(self, value: Any) -> Tensor | None:
        """The tensor of the model that an argument is, and nothing else reads."""
        return self._tensors.get(own_path(value, self._once))

    def _scaled(self, node: Node, inputs: list[Node]) -> Writer | None:
        """The layer and the tensor of the model whose product a node is, where nothing else reads the layer."""
        if node.target not in _PRODUCTS or len(inputs) != 2:
            return None
        for value, factors in (inputs, inputs[::-1]):
            held, made = self._own(factors), self._values[value]
            if held is None or len(made.writers) != 1 or made.writers[0].factors is not None or made.closed:
                continue
            layer = made.writers[0].layer
            alone = not (made.tensors or made.norms or made.sums or made.layers or made.readers)
            if alone and layer.is_linear and held.shape == layer.weight.shape[:1]:
                made.closed = True
                return Writer(layer, held)
        return None

    def _keeps_channels(self, node: Node) -> bool:
        """Whether a node gives values that it is given, their sums or means."""
        op = op_of(node, self._modules)
        if node.target in _SUMS:
            return len(node.args) == len(node.all_input_nodes) == 2 and not node.kwargs
        return op is not None and (op.effect in ("joins", "averages", "mean") or (op.effect == "moves" and op.brings))

    def _unite(self, one: Node, other: Node) -> None:
        kept, gone = self._values[one], self._values[other]
        if kept is not gone:
            kept.take(gone)
            self._values.update(dict.fromkeys(gone.nodes, kept))

    def _made(self, values: _Values) -> ResidualStream | None:
        """The stream that values are; None where they are none, or something else writes or reads them."""
        if values.closed or values.returned or values.norms or not (values.sums and values.readers and values.writers):
            return None
        width = values.writers[0].layer.weight.shape[0]
        readers = [self._reader(node, width) for node in values.readers]
        if values.layers:
            readers.append(Reader(None, tuple(values.layers), ""))
        fits = all(writer.layer.weight.shape[0] == width for writer in values.writers)
        fits &= all(tensor.dim() > 0 and tensor.shape[-1] == width for tensor in values.tensors)
        fits &= all(layer.weight.shape[1] == width for layer in values.layers)
        known = tuple(reader for reader in readers if reader is not None)
        if not fits or len(known) < len(readers):
            return None
        return ResidualStream(width, tuple(values.writers), tuple(values.tensors), known, tuple(values.sums))

    def _reader(self, node: Node, width: int) -> Reader | None:
        """A norm, and what reads it; None where that is something else than linear layers."""
        values, norm = self._values[node], norm_parameters(node, self._model, self._modules, self._once)
        others = values.writers or values.tensors or values.sums or values.readers or len(values.norms) > 1
        if norm is None or norm[0].shape != (width,) or values.closed or others:
            return None
        if not values.returned:
            fits = all(layer.weight.shape[1] == width for layer in values.layers)
            return Reader(norm, tuple(values.layers), "") if values.layers and fits else None
        end = self._end(node, values.nodes, width)
        return None if values.layers or end is None else Reader(norm, (), end)

    def _end(self, norm: Node, nodes: list[Node], width: int) -> str | None:
        """Path of the last identity among nodes behind a norm, where there are the fewest rows; else of the norm."""
        last = norm
        for node in self._graph.nodes:
            shown = self._shown.get(node)
            same = isinstance(shown, Tensor) and shown.dim() > 0 and shown.shape[-1] == width
            identity = op_of(node, self._modules) is IDENTITY and node.op == "call_module"
            if node in nodes and identity and same and str(node.target) in self._once:
                last = node
        return str(last.target) if last.op == "call_module" else None
