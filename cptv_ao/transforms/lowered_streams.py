"""Residual streams of a lowered model: see `cptv_ao.transforms.residual_streams`. Quantized layers go by the names of
their sites, all else by its path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.fx.op_table import FLOAT_SUMS, QUANTIZE
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.paths import fetch
from cptv_ao.fx.quantized_ops import of_node
from cptv_ao.fx.readers import own_path, own_table, read_once
from cptv_ao.transforms.lone_sites import LoneSites
from cptv_ao.transforms.residual_streams import Layer, Norm, StreamFinder, Values

_KEPT = ("joins", "averages", "mean", "quantizes", "dequantizes")


class Shown:
    """What the nodes of a lowered model gave on a few images.

    Attributes:
        shapes: of tensors, by the name of the node.
        floats: names of the nodes that gave one in float.
        sums: real values of quantized sums, by name.
    """

    def __init__(self, backend: Backend, few: Batch) -> None:
        self.shapes, self.floats, self.sums = dict[str, tuple[int, ...]](), set[str](), dict[str, Tensor]()
        Watcher(backend.model).watch(few, self._see)

    def _see(self, node: Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.shapes[node.name] = tuple(value.shape)
            if value.is_floating_point():
                self.floats.add(node.name)
            if packet_of(node.target) is torch.ops.quantized.add:
                self.sums[node.name] = value.dequantize()
        return value


class LoweredStreams(StreamFinder):
    """Finds them in a model.

    Args:
        backend: of it, with float weights.
        shown: of it.
    """

    def __init__(self, backend: Backend, shown: Shown) -> None:
        super().__init__(backend.model.graph)
        self._backend, self._shown, self._lone = backend, shown, LoneSites(backend)
        self._once = read_once(backend.model.graph.nodes)

    def _layer(self, node: Node) -> Layer | None:
        known, path = of_node(node, self._lone.modules), str(node.target)
        if known is None:
            module = self._lone.modules.get(path) if node.op == "call_module" else None
            if type(module) is not nn.Linear or module.bias is None or path not in self._once:
                return None
            return Layer(f"{path}.weight", f"{path}.bias", tuple(module.weight.shape))
        site = self._lone.weights.get(node.name)
        if known.product not in ("linear", "conv") or known.after or known.adds or site is None:
            return None
        weight = self._backend.float_weights.get(site.name)
        if weight is None or site.axis not in (0, None) or not self._backend.correctable(site.name):
            return None
        return Layer(site.name, None, tuple(weight.shape)) if _has_one_group(node, self._lone, weight) else None

    def _norm(self, node: Node) -> Norm | None:
        norm = self._lone.layer_norm(node)
        if norm is None or norm[0][0] is None or len(norm[1]) != 1:
            return None
        return norm[0][0], norm[0][1]

    def _tensor(self, node: Node) -> str | None:
        if node.op == "call_module":
            return own_table(node, self._lone.modules, self._once)
        path = own_path(node, self._once)
        held = None if path is None else fetch(self._backend.model, path)
        return path if isinstance(held, Tensor) and held.is_floating_point() and held.dim() > 0 else None

    def _factors(self, node: Node) -> Iterator[tuple[Node, str]]:
        if packet_of(node.target) is torch.ops.quantized.mul:
            for value, factors in (node.args[:2], node.args[1::-1]):
                path = self._lone.tensor(factors, node)
                if path is not None and isinstance(value, Node):
                    yield value, path

    def _carried(self, node: Node) -> list[Node] | None:
        op = op_of(node, self._lone.modules)
        if self._is_sum(node) or node.target in FLOAT_SUMS:
            given = [value for value in node.args[:2] if isinstance(value, Node)]
            return given if len(given) == 2 and all(value.name in self._shown.shapes for value in given) else None
        if op is QUANTIZE:
            return node.all_input_nodes[:1]
        if op is None or not (op.effect in _KEPT or (op.effect in ("moves", "brings") and op.brings)):
            return None
        return [value for value in node.all_input_nodes if value.name in self._shown.shapes]

    def _is_sum(self, node: Node) -> bool:
        return packet_of(node.target) is torch.ops.quantized.add

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(fetch(self._backend.model, name).shape)

    def _end(self, norm: Node, values: Values, width: int) -> str | None:
        """Name of the node that is returned, where it is one alone, in float, that nothing else reads."""
        end = values.returned[0]
        alone = len(set(values.returned)) == 1 == len(end.users) and end.name in self._shown.floats
        return end.name if alone and self._shown.shapes[end.name][-1:] == (width,) else None

    def _start(self, norm: Node, width: int) -> str | None:
        return None  # a layer there would have to be quantized, too


def _has_one_group(node: Node, lone: LoneSites, weight: Tensor) -> bool:
    """Whether all channels of a layer's output are of all that it reads."""
    if weight.dim() == 2:
        return True
    module: Any = lone.modules.get(str(node.target)) if node.op == "call_module" else None
    return getattr(module, "groups", None) == 1
