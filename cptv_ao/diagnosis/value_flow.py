"""Who makes and who reads the values of a quantized graph, by what its nodes are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.ops import op_of

_CONVERTS = {"quantizes", "dequantizes"}


class ValueFlow:
    """Of one quantized graph.

    Attributes:
        nodes: by name.
        modules: of the model, by path.
        activations: the activation sites.
        exported: whether the graph is one of PT2E, quantized by its own nodes.
    """

    def __init__(self, backend: Backend) -> None:
        self.modules = dict(backend.model.named_modules(remove_duplicate=False))
        self.nodes: dict[str, Node] = {node.name: node for node in backend.model.graph.nodes}
        self.activations: list[ScaleSite] = [site for site in backend.sites.values() if site.kind == "activation"]
        self.exported = backend.form.simulates_itself

    @cached_property
    def sites(self) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
        """Of each activation site the nodes that make its values and those that read them."""
        found = {}
        for site in self.activations:
            owners = [self.nodes[name] for name in site.nodes]
            made = frozenset(self._maker(owner).name for owner in owners)
            found[site.name] = made, frozenset(reader.name for owner in owners for reader in self.readers(owner))
        return found

    def effect(self, node: Node) -> str:
        """As of its `Op`; nothing where it is not known."""
        op = op_of(node, self.modules)
        return "" if op is None else op.effect

    def computes(self, node: Node) -> bool:
        """Whether a node makes new values."""
        called = node.op == "call_function" or node.op == "call_method"
        if node.op == "call_module":  # guards of an export compute nothing
            called = not self.exported and str(node.target) in self.modules
        return called and self.effect(node) not in {*_CONVERTS, "asks", "compares"}

    def readers(self, node: Node) -> Iterator[Node]:
        """What computes with the values of a node."""
        for user in node.users:
            if self.effect(user) == "dequantizes":
                yield from self.readers(user)
            elif self.computes(user):
                yield user

    def hands_on(self, name: str) -> bool:
        """Whether a node hands on the codes that it reads: what follows has no scale of its own."""
        node, op = self.nodes[name], op_of(self.nodes[name], self.modules)
        return op is not None and op.keeps and not any(self.effect(user) == "quantizes" for user in node.users)

    def onward(self, names: Collection[str]) -> frozenset[str]:
        """These nodes and, where one hands on what it reads, those that read that."""
        found, left = set[str](), list(names)
        while left:
            name = left.pop()
            if name in found:
                continue
            found.add(name)
            if self.hands_on(name):
                left += [reader.name for reader in self.readers(self.nodes[name])]
        return frozenset(found)

    def _maker(self, owner: Node) -> Node:
        """The node whose output stands on the scale that a node holds."""
        while self.effect(owner) in _CONVERTS and isinstance(owner.args[0], Node):
            owner = owner.args[0]
        return owner
