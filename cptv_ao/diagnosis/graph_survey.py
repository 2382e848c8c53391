"""What the graph of a quantized model tells without a measurement: what was not fused, not quantized, not clamped."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.blocks import Block
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.ops import op_name, op_of
from cptv_ao.fx.producers import producer

_NO_TENSOR = {"asks", "compares"}
# Weights of 7 bits and less cannot overflow a sum of two products, 2 * 255 * 64 < 2^15.
_NARROW_WEIGHT = 64


class Survey:
    """Looks at the graph of one model.

    Args:
        backend: of the model; nothing is written.
        blocks: of its sites.

    Attributes:
        blocks: as given.
    """

    def __init__(self, backend: Backend, blocks: Sequence[Block]) -> None:
        self._backend, self.blocks = backend, blocks
        self._nodes: list[Node] = list(backend.model.graph.nodes)
        self._modules = dict(backend.model.named_modules(remove_duplicate=False))
        weights = [site for site in backend.sites.values() if site.kind == "weight"]
        self._weight = {name: site for site in weights for name in site.nodes}
        activations = [site for site in backend.sites.values() if site.kind == "activation"]
        self._activation = {name: site for site in activations for name in site.nodes}

    def block_outputs(self) -> dict[str, str]:
        """The node that holds the output of each block: the last one that has a site of it or was traced in it."""
        found: dict[str, str] = {}
        own = {name: block.name for block in self.blocks for site in block.sites for name in site.nodes}
        names = {block.name for block in self.blocks}
        for node in self._nodes:
            if not node.op.startswith("call_"):
                continue
            if node.name in own:
                found[own[node.name]] = node.name
            for path, *_ in (node.meta.get("nn_module_stack") or {}).values():
                if path in names and self._effect(node) not in _NO_TENSOR:
                    found[path] = node.name
        return found

    def paths(self, names: Container[str]) -> tuple[str, ...]:
        """Paths of the modules that these nodes were traced in, in graph order."""
        return tuple(_path(node) for node in self._nodes if node.name in names)

    def in_float(self, floating: Container[str]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Layers that compute in float, and how many other ops do, by kind.

        Args:
            floating: names of the nodes whose values are floating tensors.
        """
        layers: list[str] = []
        ops: dict[str, int] = {}
        for node in self._nodes:
            kind, op = self._kind(node), op_of(node, self._modules)
            if not kind or (op is not None and op.brings) or node.name in self._weight or node.name not in floating:
                continue
            if not node.all_input_nodes or (self._floats_between and any(map(self._dequantizes, node.all_input_nodes))):
                continue
            if self._effect(node) == "layer":
                layers.append(_path(node))
            else:
                ops[kind] = ops.get(kind, 0) + 1
        return tuple(layers), ops

    def wide_weights(self) -> tuple[str, ...]:
        """Weights with codes outside their nominal range."""
        found = []
        for site in {site.name: site for site in self._weight.values()}.values():
            ends = self._code_ends(site)
            if ends is not None and not site.fixed and (ends[0] < site.qmin or ends[1] > site.qmax):
                found.append(f"{site.name} ({ends[0]}..{ends[1]} for {site.qmin}..{site.qmax})")
        return tuple(found)

    def before_wide_weights(self) -> set[str]:
        """Activation sites in front of weights whose codes are large enough to overflow a sum of two products."""
        found = set()
        known = {node for node in self._nodes if node.name in self._activation}
        for node in self._nodes:
            weight = self._weight.get(node.name)
            ends = None if weight is None else self._code_ends(weight)
            if ends is None or max(-ends[0], ends[1]) <= _NARROW_WEIGHT or not isinstance(node.args[0], Node):
                continue
            source: Any = node.args[0]
            source = source.args[0] if self._dequantizes(source) else source
            site = self._activation.get(producer(source, known, self._modules).name)
            if site is not None and site.qmax == 255:
                found.add(site.name)
        return found

    @property
    def _floats_between(self) -> bool:
        return self._backend.form.simulates_itself

    def _code_ends(self, site: ScaleSite) -> tuple[int, int] | None:
        weight = self._backend.weight(site.name)
        if weight.dtype != torch.qint8:
            return None
        codes = weight.int_repr()
        return int(codes.min()), int(codes.max())

    def _kind(self, node: Node) -> str:
        """Short name of what a node calls, to tell of it: `Linear`, `softmax`; `""` of placeholders and the like."""
        if node.op == "call_module":
            return type(self._modules[str(node.target)]).__name__ if str(node.target) in self._modules else ""
        return op_name(node).split(".")[-1] if node.op in ("call_function", "call_method") else ""

    def _dequantizes(self, node: Node) -> bool:
        return self._effect(node) == "dequantizes"

    def _effect(self, node: Node) -> str:
        """What the op of a node does; `""` where that is not known."""
        op = op_of(node, self._modules)
        return "" if op is None else op.effect


def _path(node: Node) -> str:
    """Path of the module that a node was traced in, or its name."""
    if node.op == "call_module":
        return str(node.target)
    paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return (paths[-1] if paths else "") or node.name
