"""The sites of a lowered graph that belong to one node alone and move alone, and what is around them in the graph."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import DEQUANTIZE, DROPOUT, IDENTITY, QUANTIZE, RELU, RELU6
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.quantized_ops import of_node
from cptv_ao.fx.readers import own_path, read_once, reads

_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps", "output_scale", "output_zero_point")
_PARAMETERS = ("weight", "bias")
# What functions let through above 0; nothing below.
CLIPS = {RELU: math.inf, RELU6: 6.0}


class LoneSites:
    """Of one model.

    Args:
        backend: of a lowered model.

    Attributes:
        modules: of the model, by all their names.
        outputs, weights: the sites, by the name of their node.
    """

    def __init__(self, backend: Backend) -> None:
        self.modules = dict(backend.model.named_modules(remove_duplicate=False))
        self._once = read_once(backend.model.graph.nodes)
        ties = Counter(site.tied for site in backend.sites.values())
        alone = [s for s in backend.sites.values() if len(s.nodes) == 1 and not s.fixed and ties[s.tied] == 1]
        self.outputs = {site.nodes[0]: site for site in alone if site.kind == "activation"}
        self.weights = {site.nodes[0]: site for site in alone if site.kind == "weight"}

    def dequantized_layer(self, value: Any, norm: Node) -> Node | None:
        """The quantized layer whose dequantized output a norm reads, and nothing else."""
        if (
            not isinstance(value, Node)
            or op_of(value, self.modules) is not DEQUANTIZE
            or not isinstance(value.args[0], Node)
        ):
            return None
        layer = value.args[0]
        if layer.name not in self.weights or layer.name not in self.outputs or list(layer.users) != [value]:
            return None
        known = of_node(layer, self.modules)
        if known is None or known.after or known.adds:
            return None
        return layer if [user for user in value.users if reads(user)] == [norm] else None

    def plain_layer(self, value: Any, reader: Node) -> Node | None:
        """The quantized layer whose output a node alone reads, through what changes nothing in eval mode."""
        while isinstance(value, Node) and list(value.users) == [reader]:
            if value.name in self.weights and value.name in self.outputs:
                known = of_node(value, self.modules)
                return None if known is None or known.after or known.adds else value
            if op_of(value, self.modules) not in (IDENTITY, DROPOUT) or not value.args:
                return None
            value, reader = value.args[0], value
        return None

    def tensor(self, value: Any, reader: Node) -> str | None:
        """Path of the tensor of the model that is put on a scale for a node alone."""
        if not isinstance(value, Node) or op_of(value, self.modules) is not QUANTIZE or list(value.users) != [reader]:
            return None
        return own_path(value.args[0], self._once) if value.name in self.outputs else None

    def put_on(self, norm: Node) -> ScaleSite | None:
        """The site on whose scale the output of a norm is put at once."""
        readers = [user for user in norm.users if reads(user)]
        if len(readers) != 1 or op_of(readers[0], self.modules) is not QUANTIZE:
            return None
        return self.outputs.get(readers[0].name)

    def layer_norm(self, node: Node) -> tuple[tuple[str | None, str | None], Sequence[int]] | None:
        """Paths of weight and bias, None where there is none, and the normalized shape."""
        if node.op == "call_module":
            path, module = str(node.target), self.modules[str(node.target)]
            if type(module) is not nnq.LayerNorm or path not in self._once:
                return None
            held = {name: f"{path}.{name}" for name in _PARAMETERS if getattr(module, name, None) is not None}
            return (held.get("weight"), held.get("bias")), module.normalized_shape
        if packet_of(node.target) is not torch.ops.quantized.layer_norm:
            return None
        given: dict[str, Any] = dict(zip(_LAYER_NORM, node.args, strict=False)) | node.kwargs
        found = self.own_tensors(given, _PARAMETERS)
        if found is None or "weight" not in found:
            return None
        return (found["weight"], found.get("bias")), given["normalized_shape"]

    def highs(self, node: Node) -> list[float] | None:
        """What each reader of a value lets through of it above 0; None where one also reads what is below."""
        highs: list[float] = []
        for user in node.users:
            op = op_of(user, self.modules)
            if op in (IDENTITY, DROPOUT):
                behind = self.highs(user)
                if not behind:
                    return None
                highs += behind
            elif op in CLIPS:
                highs.append(CLIPS[op])
            elif reads(user):
                return None
        return highs

    def own_tensors(self, given: Mapping[str, Any], names: Sequence[str]) -> dict[str, str] | None:
        """Paths of these arguments of a node, those that are None left out; None where one is shared or computed."""
        nodes = {name: given[name] for name in names if given.get(name) is not None}
        paths = {name: path for name, node in nodes.items() if (path := own_path(node, self._once)) is not None}
        return paths if len(paths) == len(nodes) else None
