"""Which row of the op table a node, a function or a module is: functions and packets of torch.ops by identity, modules
by type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.fx.decomposed_ops import calls, packet_of
from cptv_ao.fx.op_table import DEQUANTIZE, OPS, QUANTIZE, Op

_Row = TypeVar("_Row")


def _packets(op: Op) -> tuple[Any, ...]:
    """Those of its aten ops that this torch has."""
    return tuple(getattr(torch.ops.aten, name) for name in op.aten if hasattr(torch.ops.aten, name))


_BY_TARGET: dict[Any, Op] = {target: op for op in OPS for target in (*op.functions, *_packets(op))}
_BY_METHOD = {method: op for op in OPS for method in op.methods}
_BY_TYPE = {kind: op for op in OPS for kind in op.modules}


def op_of(node: Node, modules: Mapping[str, nn.Module]) -> Op | None:
    """What a node calls; None where it calls nothing, or what is not known."""
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target))
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return None if module is None else of_module(module)
    return of_function(node.target) if node.op == "call_function" else None


def of_function(target: Any) -> Op | None:
    """What a function or an op of torch.ops is."""
    packet = packet_of(target)
    if calls(target, "quantize_per_tensor", "quantize_per_channel"):
        return QUANTIZE
    if calls(target, "dequantize_per_tensor", "dequantize_per_channel"):
        return DEQUANTIZE
    return _BY_TARGET.get(target if packet is None else packet)


def of_module(module: nn.Module) -> Op | None:
    """What a float module is."""
    return by_type(module, _BY_TYPE)


def op_name(node: Node) -> str:
    """Short name of what a node calls, to tell of it: `quantized.add`, `quantize_per_tensor`, `flatten`."""
    packet = packet_of(node.target)
    if packet is not None:
        return str(packet).replace("::", ".")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def by_type(module: nn.Module, table: Mapping[type[nn.Module], _Row]) -> _Row | None:
    """The row of a module's type, or of the type that it has its `forward` from."""
    for kind in type(module).__mro__:
        if kind in table:
            own, known = (cast(Any, one).forward for one in (type(module), kind))
            plain = own is known and "forward" not in vars(module)
            return table[kind] if plain else None
    return None
