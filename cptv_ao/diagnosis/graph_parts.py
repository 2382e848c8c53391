"""Which part of the network each node of a quantized graph computes: what can be left in float with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.diagnosis.value_flow import ValueFlow
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.paths import ModulePaths
from cptv_ao.transforms.float_model.exclusion import Part, scope_of

_WITH_RELU = (torch.ops.quantized.add_relu, torch.ops.quantized.mul_relu)


class GraphParts:
    """Of one quantized graph.

    Args:
        backend, flow: of the model; nothing is written.
        float_model: where modules are found that lowering made a part of another op.

    Attributes:
        scopes: path of the module that each node which computes belongs to.
        outer: paths of modules that hold others of these.
        of_node: of each node that computes, the smallest part that holds it; of one that was fused with a ReLU, both.
    """

    def __init__(self, backend: Backend, flow: ValueFlow, float_model: nn.Module | None) -> None:
        self._float_model, self._paths = float_model, ModulePaths(backend.model)
        self._scope_of_site = {n: site.scope for site in backend.sites.values() for n in site.nodes}
        self._nodes = flow.nodes
        computing = [node for node in self._nodes.values() if flow.computes(node)]
        self.scopes = {node.name: self._scope(node) for node in computing}
        self.outer = {path[:i] for path in self.scopes.values() for i, c in enumerate(path) if c == "."}
        self.of_node = {node.name: parts for node in computing if (parts := self._parts(node))}

    def nodes_of(self, parts: Collection[Part]) -> frozenset[str]:
        """The nodes that compute in these parts."""
        return frozenset(
            name
            for name, path in self.scopes.items()
            if any(part.holds(path, self._nodes[name].op == "call_function") for part in parts)
        )

    def _scope(self, node: Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        return scope_of(node) or self._scope_of_site.get(node.name, "") or self._paths.of(node)

    def _parts(self, node: Node) -> frozenset[Part]:
        path = self.scopes[node.name]
        if node.op == "call_module" or (path and path not in self.outer):
            return frozenset([Part(path)])
        if node.op == "call_function":  # which a qconfig can be given to alone, within its module
            return frozenset([Part(path, functions=True), *(Part(relu) for relu in self._fused_relus(node, path))])
        return frozenset([Part(path)] if path else [])

    def _fused_relus(self, node: Node, path: str) -> Iterator[str]:
        """Modules that may be the ReLU of a function that was fused with one."""
        if packet_of(node.target) not in _WITH_RELU or self._float_model is None:
            return
        holder = dict(self._float_model.named_modules(remove_duplicate=False)).get(path, nn.Identity())
        for name, child in holder.named_children():
            if isinstance(child, nn.ReLU):
                yield f"{path}.{name}".lstrip(".")
