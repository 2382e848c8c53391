"""What every graph of a twin is built with: its nodes, which keep their names, and one module per site."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.aliasing import Changed, Memory
from cptv_ao.fx.inplace import is_known, written
from cptv_ao.fx.paths import fetch
from cptv_ao.simulation.quantizers import SiteModule
from cptv_ao.simulation.site_modules import SiteModules
from cptv_ao.simulation.writes import OnCopies, WithPart


class Builder(ABC):
    """Builds the float graph of a model node by node.

    Attributes:
        nodes: the twin's node by the name of the model's one.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self._model = backend, backend.model
        self._graph, self._owned = Graph(), dict[str, nn.Module]()
        self._sites = SiteModules(backend)
        self.nodes: dict[str, Node] = {}
        self._modules = dict(self._model.named_modules(remove_duplicate=False))
        self._instead: dict[str, Tensor] = {}  # of tensors that are others in the twin, by path
        self._made: dict[str, Node] = {}  # what first gave a value that was written into later

    def build(self) -> GraphModule:
        """The float graph; parameters and constants are copies."""
        root = nn.Module()
        memory = Memory(self._model.graph.nodes, self._held)
        for node in self._model.graph.nodes:
            self._add(node)
            self._write_through(node, memory)
        self._graph.eliminate_dead_code(is_impure_node=self._is_needed)
        for node in self._graph.nodes:
            if node.op == "get_attr":
                value = self._instead.get(str(node.target), fetch(self._model, str(node.target)))
                # A packed weight is only given to a kernel, and not each can be copied.
                packed = isinstance(value, torch.ScriptObject)
                _assign(root, str(node.target), value if packed else copy.deepcopy(value))
        for name, module in self._owned.items():
            root.add_module(name, module)
        twin = GraphModule(root, self._graph, "Twin")
        twin.graph.lint()
        return twin.eval()

    @property
    def sites(self) -> dict[str, SiteModule]:
        """The twin's modules that hold qparams, by the name of their site."""
        return self._sites.made

    def _is_needed(self, node: Node) -> bool:
        """Whether a node must stay even if nothing reads its value: what it may write into is read."""
        owned = self._owned.get(str(node.target))
        return node.op in {"placeholder", "output"} or (isinstance(owned, OnCopies) and owned.shared)

    def _held(self, node: Node) -> Any:
        return fetch(self._model, str(node.target)) if node.op == "call_module" else None

    def _write_through(self, node: Node, memory: Memory) -> None:
        """The twin never writes in place: what the model reads later of the memory that a node writes is another value
        then.

        Before: v = x[:, 0]; v.mul_(2); use x      After: v = x[:, 0]; w = v.mul(2); x' = x with w in it; use x'
        """
        held = self._held(node)
        if node.name not in self.nodes:
            return
        new = self.nodes[node.name]
        name = str(new.target)
        if not is_known(node, held) and name in self._owned and not _on_scales(self._owned[name]):
            self._owned[name] = OnCopies(self._owned[name], node.name, memory.read_later(node))
        elif written(node, held) is not None:
            changed = memory.changed_by(node)
            if changed is None:
                raise UnsupportedModelError(
                    f"{node.name}: the float twin does not know what becomes of all that shares the memory that "
                    f"{node.target} writes in place and is read later",
                    node.name,
                )
            for change in changed:
                self.nodes[change.node.name] = self._changed(change, new, memory)

    def _changed(self, change: Changed, part: Node, memory: Memory) -> Node:
        """A value that has a part of it replaced, or is made again of one that has."""
        old = self.nodes[change.node.name]
        made = self._made.setdefault(change.node.name, old)
        if change.source is not None:
            source = self.nodes[change.source.name]
            if memory.is_same(change.node):
                return source
            return self._graph.create_node(made.op, made.target, (source, *made.args[1:]), dict(made.kwargs))
        if not change.steps:
            return part
        name = f"{old.name}_with_{part.name}"
        self._owned[name] = WithPart(change.steps)
        return self._graph.create_node("call_module", name, (old, part), name=name)

    @property
    def notes(self) -> list[str]:
        """What is to be said of the model or its twin."""
        return []

    @abstractmethod
    def _add(self, node: Node) -> None:
        """Put what stands for a node of the model into the graph."""

    def _call(self, node: Node, module: nn.Module, args: Any = None, kwargs: Any = None) -> None:
        """A module in the place of a node, with these arguments of the model's nodes, or with all of the node's own."""
        name = f"op_{node.name}"
        self._owned[name] = module
        args, kwargs = (node.args, node.kwargs) if args is None else (args, kwargs or {})
        mapped, named = self._mapped(args), self._mapped(kwargs)
        self.nodes[node.name] = self._graph.create_node("call_module", name, mapped, named, name=node.name)

    def _copy(self, node: Node) -> None:
        self.nodes[node.name] = self._graph.node_copy(node, lambda n: self.nodes[n.name])

    def _mapped(self, given: Any) -> Any:
        """Arguments with the twin's nodes."""
        return torch.fx.node.map_arg(given, lambda n: self.nodes[n.name])


def _on_scales(module: nn.Module) -> bool:
    """Whether a module of the twin computes quantized values itself."""
    return any(isinstance(part, SiteModule) for part in module.modules())


def _assign(root: nn.Module, target: str, value: Any) -> None:
    """Hold a parameter, tensor or constant of a model at its own path, without gradient."""
    *path, leaf = target.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        value.requires_grad_(False)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(leaf, value.detach())
    else:
        setattr(root, leaf, value)
