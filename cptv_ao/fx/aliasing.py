"""Which values of a graph share memory, and what becomes of them when a node works in place.

What is a view torch says itself, in the schemas of its ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.inplace import DROPOUT_FUNCTIONS, DROPOUTS, first_input, is_known, may_write, overloads, written
from cptv_ao.fx.known_functions import aten_name

#: The module of a call_module node, None of others.
Held = Callable[[Node], Any]

# Modules that return their input, or a view of it.
_VIEWING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS)
# Whether these return their input or a copy depends on its layout, dtype or device; torch's ops of other names say so.
_UNCERTAIN = {
    "contiguous", "reshape", "reshape_as", "flatten", "to", "type", "type_as", "float", "double", "half", "bfloat16",
    "cpu", "cuda", "_to_copy",
}  # fmt: skip
_ATTRIBUTE_VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}
_LISTS = {"chunk", "split", "unbind", "tensor_split", "split_with_sizes", "hsplit", "vsplit", "dsplit"}


@dataclass(frozen=True)
class Changed:
    """A value that is another once a node has written in place.

    Attributes:
        node: the value.
        steps: the nodes from it to the view of it that was written into; none: it is the very same tensor.
        source: the value that it is made of, again, where it is no part of that way; it comes before this one.
    """

    node: Node
    steps: tuple[Node, ...] = ()
    source: Node | None = None


class Memory:
    """Which values of a graph share memory.

    Args:
        nodes: in the order in which they run.
        held: the module of a call_module node, None of others.
    """

    def __init__(self, nodes: Iterable[Node], held: Held) -> None:
        self._nodes = list(nodes)
        self._index = {node: i for i, node in enumerate(self._nodes)}
        self._held = held
        self._sources = {node: _viewed(node, held) for node in self._nodes}
        self._writers = [node for node in self._nodes if may_write(node, held(node))]
        self._roots: dict[Node, frozenset[Node]] = {}
        for node in self._nodes:
            above = [self._roots[source] for source in self._sources[node]]
            self._roots[node] = frozenset().union(*above) if above else frozenset((node,))

    def read_later(self, node: Node) -> bool:
        """Whether what a node is given is read again after it, by any name."""
        return any(self._later(other, node) for source in node.all_input_nodes for other in self._family(source, node))

    def shared(self, nodes: Sequence[Node], at: int) -> bool:
        """Whether some of these values share memory that a node from `at` on may write into."""
        seen: dict[Node, int] = {}
        for root in (root for node in nodes for root in self._roots[node]):
            seen[root] = seen.get(root, 0) + 1
        twice = {root for root, count in seen.items() if count > 1}
        later = (node for node in self._writers if self._index[node] >= at) if twice else ()
        return any(twice & self._roots[source] for node in later for source in node.all_input_nodes)

    def changed_by(self, node: Node) -> list[Changed] | None:
        """The values that are others once an in-place node has run; None where one of them is read later, and it cannot
        be told what it is then."""
        target = written(node, self._held(node))
        assert target is not None
        above = self._above(target, node)
        if above is None:
            return None
        found = {change.node: change for change in above}
        path = {target, *(step for change in above for step in change.steps)}
        for other in self._family(target, node):
            read = self._later(other, node) and not self._apart(other, path, node)
            if other not in found and (change := self._made_again(other, found)) is not None:
                found[other] = change
            if read and (other not in found or (_is_list(other) and found[other].source is None)):
                return None
        return [change for change in found.values() if change.source is not None or not _is_list(change.node)]

    def _made_again(self, node: Node, changed: Container[Node]) -> Changed | None:
        """A value of which nothing but its source was written: a view, or the very same tensor."""
        sources = self._sources[node]
        if len(sources) != 1 or sources[0] not in changed:
            return None
        return Changed(node, (), sources[0]) if self.is_same(node) or self._is_view(node) else None

    def _above(self, target: Node, writer: Node) -> list[Changed] | None:
        """What is written into, what it is a view of, and so on; None where that cannot be told of all that is read
        later, or where it is the model's own memory, which is another in each run."""
        found, steps = [Changed(target)], tuple[Node, ...]()
        certain = True  # beyond what may be a copy nothing may be read again: it is written, or it is not
        node = target
        while sources := self._sources[node]:
            if len(sources) > 1 or not is_known(node, self._held(node)):
                return None
            if not self.is_same(node):
                certain = certain and self._is_view(node)
                steps = (node, *steps)
            node = sources[0]
            if certain:
                found.append(Changed(node, steps))
            elif self._later(node, writer):
                return None
        return None if node.op == "get_attr" else found

    def _family(self, source: Node, before: Node) -> list[Node]:
        roots = self._roots[source]
        return [n for n in self._nodes[: self._index[before]] if roots & self._roots[n]]

    def _later(self, node: Node, than: Node) -> bool:
        return any(self._index[user] > self._index[than] for user in node.users)

    def is_same(self, node: Node) -> bool:
        """Whether a node's value is the very tensor that it was given."""
        module = self._held(node)
        if written(node, module) is not None:
            return True
        return node.op == "call_module" and type(module) in (nn.Identity, *DROPOUTS)

    def _is_view(self, node: Node) -> bool:
        """Whether a node is certain to give a view, which can be made again of another tensor."""
        if node.op == "call_module" or aten_name(node.target) in _UNCERTAIN or node.target in DROPOUT_FUNCTIONS:
            return False
        return bool(node.args) and node.all_input_nodes == [node.args[0]] and _plain_index(node)

    def _apart(self, other: Node, path: set[Node], than: Node) -> bool:
        """Whether a value is another item of a list than the one that was written into, or only such are read of it."""
        if _is_list(other) and other in {s for n in path for s in self._sources[n]}:
            later = [user for user in other.users if self._index[user] > self._index[than]]
            return all(_is_other_item(user, path) for user in later)
        node = other
        while sources := self._sources[node]:
            if len(sources) > 1:
                return False
            if _is_list(sources[0]) and _is_other_item(node, path):
                return any(sources[0] in self._sources[n] for n in path)
            node = sources[0]
        return False


def _is_list(node: Node) -> bool:
    """Whether a node gives several values."""
    return aten_name(node.target) in _LISTS


def _is_other_item(node: Node, path: Iterable[Node]) -> bool:
    taken = [n.args[1] for n in path if n.target is operator.getitem and n.args[0] is node.args[0]]
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, int) and all(isinstance(t, int) and t >= 0 for t in taken) and 0 <= index not in taken


def _plain_index(node: Node) -> bool:
    """Not so where an index is a list or a tensor, which gives a copy."""
    if node.target is not operator.getitem:
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is None or part is ... or isinstance(part, (int, slice)) for part in index)


def _viewed(node: Node, held: Held) -> list[Node]:
    """Inputs whose memory a node's value may be."""
    module = held(node)
    if (target := written(node, module)) is not None:
        return [target]
    if not is_known(node, module):
        return list(node.all_input_nodes)
    given = first_input(node)
    first = [] if given is None else [given]
    if node.op == "call_module":
        return first if any(isinstance(part, _VIEWING_MODULES) for part in module.modules()) else []
    if node.op == "call_function" and node.target is getattr:
        return first if node.args[1] in _ATTRIBUTE_VIEWS else []
    if node.target is operator.getitem or aten_name(node.target) in _UNCERTAIN or node.target in DROPOUT_FUNCTIONS:
        return first
    return first if _returns_views(node) else []


def _returns_views(node: Node) -> bool:
    """What torch says of its op."""
    if node.op not in ("call_function", "call_method"):
        return False
    return _is_viewing(node.target if packet_of(node.target) is not None else aten_name(node.target))


@cache
def _is_viewing(op: Any) -> bool:
    packet = getattr(torch.ops.aten, op, None) if isinstance(op, str) and op.isidentifier() else op
    ops = overloads(packet) if isinstance(packet, torch._ops.OpOverloadPacket) else []
    ops = [op] if isinstance(op, torch._ops.OpOverload) else ops
    returned = [result.alias_info for found in ops for result in found._schema.returns]
    return any(info is not None and not info.is_write for info in returned)
