"""Parts of a network that stay float, in the words of stock `prepare_fx` and `prepare_pt2e`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

# Calls of one function in one module that are left in float, the first so many.
_CALLS = 64
_ANNOTATION = "quantization_annotation"


@dataclass(frozen=True, order=True)
class Part:
    """A module with all in it, or the functions alone that its own `forward` calls (residual adds, say).

    Attributes:
        path: of the module; `""` is the network.
        functions: the functions alone.
    """

    path: str
    functions: bool = False

    def __str__(self) -> str:
        return f"functions of {self.path or 'the network'}" if self.functions else self.path

    def holds(self, path: str, function: bool) -> bool:
        """Whether a node is in it.

        Args:
            path: of the module that the node is, or was traced in.
            function: whether it is a function that the module calls.
        """
        if self.functions:
            return function and path == self.path
        return path == self.path or path.startswith(f"{self.path}.")


def without(mapping: Any, parts: Sequence[Part]) -> Any:
    """A copy of a `QConfigMapping` in which the qconfig of these parts is None."""
    found = copy.deepcopy(mapping)
    functions = [kind for kind in quantizable_kinds() if not isinstance(kind, (type, str))]
    for part in parts:
        if not part.functions:
            found.set_module_name(part.path, None)
            continue
        for function in functions:
            for index in range(_CALLS):
                found.set_module_name_object_type_order(part.path, function, index, None)
    return found


#: Takes the qconfig of a node out of a `QConfigMapping`.
Leave = Callable[[Any], Any]


def leaving_nodes(graph: Graph, scopes: Mapping[str, tuple[str, Any]]) -> dict[Node, Leave]:
    """How each node that calls something is left in float, in graph order.

    Args:
        scopes: `node_name_to_scope` of the tracer that made the graph.
    """
    seen: Counter[Any] = Counter()
    found: dict[Node, Leave] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found[node] = _leaving("set_module_name", str(node.target))
        elif node.op == "call_method":  # torch.ao knows these by name only
            found[node] = _leaving("set_object_type", node.target)
        elif node.op == "call_function":
            kind = (scopes[node.name][0], node.target)
            found[node] = _leaving("set_module_name_object_type_order", *kind, seen[kind])
            seen[kind] += 1
    return found


def _leaving(setter: str, *where: Any) -> Leave:
    return lambda mapping: getattr(mapping, setter)(*where, None)


def quantizable_kinds() -> list[Any]:
    """The functions, names of methods and types of modules that torch.ao quantizes."""
    from torch.ao.quantization.backend_config import get_native_backend_config

    patterns = [config.pattern for config in get_native_backend_config().configs]
    return list(dict.fromkeys(kind for pattern in patterns for kind in _kinds(pattern)))


def _kinds(pattern: Any) -> Iterator[Any]:
    if isinstance(pattern, tuple):
        for part in pattern:
            yield from _kinds(part)
    elif callable(pattern) or isinstance(pattern, str):
        yield pattern


class Without:
    """A quantizer of PT2E that annotates what another one does, but for some parts.

    Args:
        quantizer: any that `prepare_pt2e` takes.
        parts: to leave in float.
    """

    def __init__(self, quantizer: Any, parts: Sequence[Part]) -> None:
        self._quantizer, self._parts = quantizer, tuple(parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_quantizer":
            raise AttributeError(name)
        return getattr(self._quantizer, name)

    def annotate(self, model: GraphModule) -> GraphModule:
        """As the quantizer does, and take back what it said of the parts, and what rests on that."""
        found: GraphModule = self._quantizer.annotate(model)
        for node in found.graph.nodes:
            if _ANNOTATION in node.meta and any(part.holds(scope_of(node), True) for part in self._parts):
                del node.meta[_ANNOTATION]
        while any([_taken_back(node) for node in found.graph.nodes if _ANNOTATION in node.meta]):
            pass
        return found


def _taken_back(node: Node) -> bool:
    """Whether an annotation shared the qparams of one that is gone, and went too."""
    annotation = node.meta[_ANNOTATION]
    specs = [*annotation.input_qspec_map.values(), annotation.output_qspec]
    gone = any(not _stands(spec.edge_or_node) for spec in specs if hasattr(spec, "edge_or_node"))
    if gone:
        del node.meta[_ANNOTATION]
    return gone


def _stands(place: Any) -> bool:
    """Whether what is shared is annotated: an output, or the edge from a node to the one that reads it."""
    if isinstance(place, Node):
        return _ANNOTATION in place.meta and place.meta[_ANNOTATION].output_qspec is not None
    source, reader = place
    return _ANNOTATION in reader.meta and source in reader.meta[_ANNOTATION].input_qspec_map


def scope_of(node: Node) -> str:
    """Path of the innermost module that a node was traced in, as far as the graph tells; `""`: in none."""
    paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    path = paths[-1] if paths else ""
    return path.partition("@")[0]  # of a module that is called more than once
