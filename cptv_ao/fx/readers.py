"""Who reads what in a graph: which node alone has a tensor, and which reads the numbers of a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from cptv_ao.fx.ops import op_of

# What a value can be asked for without its numbers.
_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def read_once(nodes: Iterable[Node]) -> set[str]:
    """Targets of the tensors and modules that one node alone has."""
    targets = Counter(str(node.target) for node in nodes if node.op in {"get_attr", "call_module"})
    return {target for target, count in targets.items() if count == 1}


def own_path(value: Any, once: Container[str]) -> str | None:
    """Path of the tensor that a value is, where one node alone reads it; None of any other value.

    Args:
        value: argument of a node.
        once: as `read_once` gives it.
    """
    if not isinstance(value, Node) or value.op != "get_attr" or len(value.users) != 1:
        return None
    return str(value.target) if str(value.target) in once else None


def is_shared(layer: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer, or its weight, is at more than one place among the modules of a model."""
    return sum(one is layer or getattr(one, "weight", None) is layer.weight for one in modules.values()) > 1


def own_table(node: Node, modules: Mapping[str, nn.Module], once: Container[str]) -> str | None:
    """Path of the float table whose rows a node gives, where one node alone reads it.

    Args:
        modules: of the model.
        once: as `read_once` gives it.
    """
    path = str(node.target)
    module = modules.get(path) if node.op == "call_module" else None
    if type(module) is not nn.Embedding or module.max_norm is not None or path not in once:
        return None
    return None if is_shared(module, modules) else f"{path}.weight"


def users_of(node: Node) -> list[Node]:
    """The nodes that read a value, in graph order: the order that a node has them in is another one in a copy."""
    return sorted(node.users)


def reads(user: Node) -> bool:
    """Whether a node reads the numbers of its first input, not just its shape."""
    if user.target is getattr:
        return user.args[1] not in _ATTRIBUTES
    op = op_of(user, {})
    return op is None or op.effect != "asks"
