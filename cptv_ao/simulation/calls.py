"""What a node of the model calls, to tell of it and out of place, and what the twin calls instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.inplace import argument_of, out_of_place, parameters, without_out, written
from cptv_ao.fx.ops import op_name

# What needs strides that the kernels of the twin may not give, as the float form of attention.
_COPYING: dict[Any, Any] = {
    "view": "reshape",
    "view_as": "reshape_as",
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


class Call(NamedTuple):
    """A module of the twin, and the nodes of the model whose values it is called with; None: with all of the node's own
    arguments."""

    module: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None


def told(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """What a node calls, to tell of it."""
    return type(modules[str(node.target)]).__name__ if node.op == "call_module" else op_name(node)


def unsupported(node: Node, op: str) -> UnsupportedModelError:
    """The error that names a node."""
    return UnsupportedModelError(f"{node.name}: the float twin does not know {op}", node.name)


def pure(node: Node, held: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The call of a node, out of place and whatever the strides: what is called, positional and keyword arguments.

    Args:
        held: the module of a call_module node.

    Raises:
        UnsupportedModelError: it works in place, and torch has no other form of it.
    """
    target: Any = node.target
    args, kwargs = list(node.args), {name: value for name, value in node.kwargs.items() if name != "out"}
    if argument_of(node, "inplace", False):
        if "inplace" in kwargs:
            kwargs["inplace"] = False
        else:
            args[parameters(target).index("inplace")] = False
    elif "out" in node.kwargs:
        target = without_out(target)
    elif written(node, held) is not None:
        target = out_of_place(target)
    elif target in _COPYING and not _is_dtype(args[1:], kwargs):
        target = _COPYING[target]
        kwargs = {"shape" if name == "size" else name: value for name, value in kwargs.items()}
    if target is None:
        raise UnsupportedModelError(
            f"{node.name}: the float twin knows no form of {node.target} that does not write in place", node.name
        )
    return target, tuple(args), kwargs


def _is_dtype(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a view is one of the same bytes as another type."""
    return "dtype" in kwargs or any(isinstance(arg, torch.dtype) for arg in args)
