"""What a graph computes of parameters and constants alone, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

#: Names of the parameters that hold what was computed once begin so.
FOLDED = "folded_"


def fold(graph: Graph, value_of: Callable[[Node], Any], owner: nn.Module) -> None:
    """Compute what depends on parameters and constants alone, and hold it as a parameter, as all that is used.

    Before: get_attr q --> cat --> linear.bias      After: get_attr folded_0 --> linear.bias
            get_attr v ----^
    A buffer would be a plain tensor to the next tracer, whose methods take no proxies.
    """
    constant: set[Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        plain = node.op == "get_attr" and isinstance(value_of(node), Tensor)
        if plain or (node.op in {"call_function", "call_method"} and inputs and constant.issuperset(inputs)):
            constant.add(node)
    count = 0
    for node in list(graph.nodes):
        users = [user for user in node.users if user not in constant]
        value = value_of(node) if node in constant else None
        if node not in constant or not users or isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor):
            while hasattr(owner, name := f"{FOLDED}{count}"):
                count += 1
            owner.register_parameter(name, nn.Parameter(value.detach().clone(), value.is_floating_point()))
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
        else:
            for user in users:
                _inline(user, node, value)


def _inline(user: Node, node: Node, value: Any) -> None:
    """Put a value in the place of a node among the arguments of a user of it."""

    def exchange(argument: Node) -> Any:
        return value if argument is node else argument

    user.args, user.kwargs = map_arg(user.args, exchange), map_arg(user.kwargs, exchange)  # type: ignore[assignment]
