"""Ops that hand the qparams of their first input on: where a quantized value really comes from."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import nn
from torch.fx import Node

from cptv_ao.fx.ops import op_of


def producer(node: Node, known: Container[Node], modules: Mapping[str, nn.Module]) -> Node:
    """Walk up through the ops that keep the qparams of their first input, to a node that is known or does not."""
    while node not in known and node.args and isinstance(node.args[0], Node) and _passes(node, modules):
        node = node.args[0]
    return node


def _passes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    op = op_of(node, modules)
    return op is not None and op.keeps
