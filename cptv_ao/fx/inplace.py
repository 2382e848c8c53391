"""Which nodes of a graph work in place on their inputs, and what stands for these out of place.

Nothing is decided by a list where torch says it itself: ops have schemas, functions have signatures. Where nothing is
known of a function or module, it may write into all that it is given.
"""

from __future__ import annotations

import inspect
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from cptv_ao.fx.decomposed_ops import is_of, packet_of
from cptv_ao.fx.known_functions import counterpart, is_listed, is_listed_module, plain_name, works_in_place
from cptv_ao.fx.quantized_ops import of_module, of_node

#: modules and functions that return their input in eval mode
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_FUNCTIONS = {
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout,
}  # fmt: skip


class OutOfPlace(nn.Module):
    """A module that never writes into what it is given; those of the float twin are such."""


def may_write(node: Node, held: Any) -> bool:
    """Whether a node may work in place; one of which nothing is known may.

    Args:
        held: the module of a call_module node.
    """
    fused = of_module(held) if node.op == "call_module" else of_node(node, {})
    overwrites = fused is not None and fused.adds  # oneDNN's kernel may write over what it adds
    return overwrites or written(node, held) is not None or not is_known(node, held)


def is_known(node: Node, held: Any) -> bool:
    """Whether it can be told if a node works in place."""
    if node.op == "call_module":
        return all(_is_known_module(part) for part in held.modules())
    if node.op != "call_function" or isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    return is_listed(node.target)


def _is_known_module(module: nn.Module) -> bool:
    if isinstance(module, (GraphModule, torch.jit.ScriptModule)) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return isinstance(module, OutOfPlace) or is_listed_module(module)


def written(node: Node, held: Any) -> Node | None:
    """The input that a node certainly works in place on; None where there is none, or nothing is known."""
    first = first_input(node)
    if node.op == "call_method":
        return first if works_in_place(node.target) else None
    if node.op == "call_module":
        parts = (part for part in held.modules() if not (isinstance(part, DROPOUTS) and not part.training))
        return next(iter(node.all_input_nodes), None) if any(getattr(p, "inplace", False) for p in parts) else None
    if node.op != "call_function":
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    target: Any = node.target
    if packet_of(target) is not None:
        place = _written_argument(target if isinstance(target, torch._ops.OpOverload) else overloads(target)[0])
        if place is not None:
            index, name = place
            given = node.args[index] if index < len(node.args) else node.kwargs.get(name)
            return given if isinstance(given, Node) else None
    if target in DROPOUT_FUNCTIONS and argument_of(node, "training", True) is False:
        return None
    return first if works_in_place(target) or argument_of(node, "inplace", False) else None


@cache
def _written_argument(op: torch._ops.OpOverload) -> tuple[int, str] | None:
    """Place and name of the argument that an op writes into."""
    arguments = enumerate(op._schema.arguments)
    places = (place for place in arguments if place[1].alias_info is not None and place[1].alias_info.is_write)
    return next(((index, argument.name) for index, argument in places), None)


def first_input(node: Node) -> Node | None:
    """What a node is given first, by place or by name."""
    first = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
    return first if isinstance(first, Node) else None


def argument_of(node: Node, name: str, default: Any = None) -> Any:
    """What the function of a node is given by this name, by keyword or by its place."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = parameters(node.target)
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else default


@lru_cache(maxsize=4096)
def parameters(target: Any) -> tuple[str, ...]:
    """Names of the parameters of a function; none where they are not known."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = overloads(target)[0]
    if isinstance(target, torch._ops.OpOverload):
        return tuple(argument.name for argument in target._schema.arguments)
    try:
        return tuple(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # of a function in C
        return ()


def overloads(packet: Any) -> list[Any]:
    """The ops of one name."""
    return [getattr(packet, name) for name in packet.overloads()]


def out_of_place(target: Any) -> Any:
    """The method, function or op that returns what an in-place one writes; None where torch has none."""
    if isinstance(target, str):
        return name if callable(getattr(torch.Tensor, name := plain_name(target), None)) else None
    packet = packet_of(target)
    if packet is None:
        return counterpart(target)
    pure = getattr(torch.ops.aten, plain_name(packet.__name__), None) if is_of(packet, torch.ops.aten) else None
    return pure if target is packet else getattr(pure, target._overloadname, None)


def without_out(target: Any) -> Any:
    """The function or op without its argument `out`; None where torch has none."""
    if not isinstance(target, torch._ops.OpOverload):
        return target

    def types(op: Any) -> list[str]:
        return [str(a.type) for a in op._schema.arguments if a.alias_info is None or not a.alias_info.is_write]

    others = (op for op in overloads(target.overloadpacket) if len(types(op)) == len(op._schema.arguments))
    return next((op for op in others if types(op) == types(target)), None)
