"""Residual streams of a float model: see `cptv_ao.transforms.residual_streams`."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional

from cptv_ao.fx.op_table import FLOAT_SUMS, IDENTITY
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.readers import is_shared, own_path, own_table, read_once
from cptv_ao.transforms.float_model.example_runs import tensors_of
from cptv_ao.transforms.float_model.smooth_quant import norm_paths
from cptv_ao.transforms.residual_streams import Layer, Norm, StreamFinder, Values

_SUMS = {*FLOAT_SUMS, operator.iadd}
_PRODUCTS = {operator.mul, operator.imul, torch.mul}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR = ("input", "weight", "bias")


class FloatStreams(StreamFinder):
    """Finds them in a model.

    Args:
        model: in float.
        graph: as traced from it.
        shown: what the nodes of the graph gave on example images.
    """

    def __init__(self, model: nn.Module, graph: Graph, shown: Mapping[Node, Any]) -> None:
        super().__init__(graph)
        self._shown = shown
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._once = read_once(graph.nodes)
        # Of the model itself; constants that tracing has made are not.
        held = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._tensors: dict[str | None, Tensor] = dict(held)

    def _layer(self, node: Node) -> Layer | None:
        path = str(node.target)
        if node.op == "call_module":
            module: Any = self._modules[path]
            plain = type(module) is nn.Linear or (type(module) in _CONVOLUTIONS and module.groups == 1)
            if not plain or path not in self._once or is_shared(module, self._modules):
                return None
            return Layer(f"{path}.weight", f"{path}.bias", tuple(module.weight.shape))
        if node.target is not functional.linear:
            return None
        given = dict(zip(_LINEAR, node.args, strict=False)) | node.kwargs
        weight, bias = (self._own(given.get(name)) for name in ("weight", "bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            return None
        return Layer(weight, bias, self._shape(weight))

    def _norm(self, node: Node) -> Norm | None:
        paths = norm_paths(node, self._modules, self._once)
        held = paths is not None and paths[0] in self._tensors and (paths[1] is None or paths[1] in self._tensors)
        return paths if held else None

    def _tensor(self, node: Node) -> str | None:
        if node.op == "call_module":
            return own_table(node, self._modules, self._once)
        held = self._own(node)
        return held if held is not None and self._tensors[held].is_floating_point() else None

    def _own(self, value: Any) -> str | None:
        """Path of the tensor of the model that an argument is, and nothing else reads."""
        path = own_path(value, self._once)
        return path if path in self._tensors else None

    def _factors(self, node: Node) -> Iterator[tuple[Node, str]]:
        inputs = node.all_input_nodes
        if node.target in _PRODUCTS and len(inputs) == 2:
            for value, factors in (inputs, inputs[::-1]):
                if (held := self._own(factors)) is not None:
                    yield value, held

    def _carried(self, node: Node) -> list[Node] | None:
        inputs, op = node.all_input_nodes, op_of(node, self._modules)
        if self._is_sum(node):
            kept = len(node.args) == len(inputs) == 2 and not node.kwargs
        else:
            moves = op is not None and op.effect == "moves" and op.brings
            kept = moves or (op is not None and op.effect in ("joins", "averages", "mean"))
        return [value for value in inputs if tensors_of(self._shown.get(value))] if kept else None  # no size

    def _is_sum(self, node: Node) -> bool:
        return node.target in _SUMS

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def _end(self, norm: Node, values: Values, width: int) -> str | None:
        """Path of the last identity among nodes behind a norm, where there are the fewest rows; else of the norm."""
        last = norm
        for node in self._graph.nodes:
            shown = self._shown.get(node)
            same = isinstance(shown, Tensor) and shown.dim() > 0 and shown.shape[-1] == width
            identity = op_of(node, self._modules) is IDENTITY and node.op == "call_module"
            if node in values.nodes and identity and same and str(node.target) in self._once:
                last = node
        return str(last.target) if last is not norm else self._start(norm, width)

    def _start(self, norm: Node, width: int) -> str | None:
        """Path of the module that the norm is, or that calls it."""
        paths = self._norm(norm)
        owner = "" if paths is None else paths[0].rpartition(".")[0]
        module = self._modules.get(owner)
        return owner if isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) == (width,) else None
