"""Where a lowered graph computes scores of attention, softmax(q k^T): the keys, and the linear layer that gives them.

quantized linear -> ... moved about, put on other scales ... -> k
scaled_dot_product_attention(q, k, v), or softmax(matmul(q, k^T) ...)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.decomposed_ops import called
from cptv_ao.fx.op_table import FLOAT_SCALINGS, FLOAT_SUMS, SOFTMAX
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.quantized_ops import SUMS, of_node
from cptv_ao.fx.readers import reads
from cptv_ao.transforms.lone_sites import LoneSites

_FUSED = functional.scaled_dot_product_attention
_OPERANDS = ("query", "key", "value")
_MATMULS: set[Any] = {operator.matmul, torch.matmul, torch.bmm, torch.ops.quantized.matmul}
_MATMUL_METHODS = {"matmul", "bmm"}
_SCALINGS: set[Any] = {*FLOAT_SCALINGS, torch.ops.quantized.mul}
_ADDITIONS: set[Any] = {*FLOAT_SUMS, *SUMS}
_MASKS = {"masked_fill"}


@dataclass(frozen=True)
class Keys:
    """Keys of attention.

    Attributes:
        node: that gives them to the product with the queries.
        dim: of their channels there.
        source: the quantized linear layer whose channels they are.
        weight: site of that, whose bias may change.
        sites: of activations from there to the softmax, by the node of each.
        brought: those of these nodes that come before the product.
    """

    node: str
    dim: int
    source: str
    weight: str
    sites: dict[str, str]
    brought: tuple[str, ...]


class AttentionPatterns:
    """Looks for them.

    Args:
        backend: of a lowered model.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self._graph, self._lone = backend, backend.model.graph, LoneSites(backend)
        activations = (site for site in backend.sites.values() if site.kind == "activation")
        self._on_scale = {node: site.name for site in activations for node in site.nodes}

    def keys(self) -> list[Keys]:
        """In graph order; none where a scale on the way moves with others."""
        found = (self._keys(value, dim, scores) for value, dim, scores in self._products())
        return [keys for keys in found if keys is not None]

    def _products(self) -> Iterator[tuple[Any, int, list[Node]]]:
        """What is taken for keys, the dimension of their channels, and the nodes from the product to the softmax."""
        for node in self._graph.nodes:
            if node.target is _FUSED:
                given = dict(zip(_OPERANDS, node.args, strict=False)) | node.kwargs
                yield given.get("key"), -1, []
                continue
            softmax = op_of(node, self._lone.modules) is SOFTMAX and node.args
            if softmax and (scores := self._scores(node.args[0])):
                yield scores[-1].args[1], -2, scores  # their last dimensions are exchanged

    def _scores(self, value: Any) -> list[Node]:
        """The way back from what a softmax alone reads to a product; empty where there is none."""
        if not isinstance(value, Node) or len([user for user in value.users if reads(user)]) != 1:
            return []
        if _is_matmul(value):
            return [value]
        adds = called(value) in _ADDITIONS
        inputs = value.args[:2] if adds else value.args[:1] if self._passes(value) or _is_mask(value) else ()
        ways = (self._scores(one) for one in inputs)
        return next(([value, *way] for way in ways if way), [])

    def _keys(self, value: Any, dim: int, scores: list[Node]) -> Keys | None:
        """What a quantized linear layer gives, moved about and put on other scales at most."""
        way, node = list[Node](), value
        while isinstance(node, Node):
            way.append(node)
            if node.name in self._lone.weights:
                return self._given(way, dim, scores)
            node = node.args[0] if self._passes(node) and node.args else None
        return None

    def _given(self, way: list[Node], dim: int, scores: list[Node]) -> Keys | None:
        """The same, of the way back from the product to the layer."""
        source = way[-1]
        layer, weight = of_node(source, self._lone.modules), self._lone.weights[source.name].name
        plain = layer is not None and layer.product == "linear" and not layer.after and not layer.adds
        brought, nodes = ([node.name for node in part if node.name in self._on_scale] for part in (way, scores + way))
        if not plain or not self._backend.correctable(weight) or not all(name in self._lone.outputs for name in nodes):
            return None
        sites = {name: self._on_scale[name] for name in nodes}
        return Keys(way[0].name, dim, source.name, weight, sites, tuple(brought))

    def _passes(self, node: Node) -> bool:
        """Whether a node gives what it is given, elsewhere, on another scale, or times a number."""
        if called(node) in _SCALINGS:
            return len(node.args) == 2 and not isinstance(node.args[1], Node) and not node.kwargs
        op = op_of(node, self._lone.modules)
        return op is not None and op.brings and op.effect not in ("joins", "asks")


def _is_matmul(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _MATMUL_METHODS
    return called(node) in _MATMULS and len(node.args) >= 2


def _is_mask(node: Node) -> bool:
    return node.op == "call_method" and node.target in _MASKS
