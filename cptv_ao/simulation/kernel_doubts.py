"""Kernels that do not do what the graph says: they write where others read, or pass settings over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.fx import Node

from cptv_ao.fx.producers import producer


def overwrites_what_is_read(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether something else reads what a fused add adds; oneDNN's kernel may write its output there (torch 2.14)."""
    nodes = list(node.graph.nodes)
    place = {other: index for index, other in enumerate(nodes)}
    root = producer(cast(Node, node.args[1]), (), modules)
    kin = [other for other in nodes if producer(other, (), modules) is root]
    return node.args[0] in kin or any(place[user] > place[node] for other in kin for user in other.users)


def divides_otherwise(settings: Mapping[str, Any]) -> bool:
    """Whether QNNPACK's average pools, which divide by the whole window, are asked for something else (torch 2.14)."""
    if settings.get("ceil_mode", False):  # another kernel computes these
        return False
    padded = settings.get("padding", 0) not in (0, (0,), (0, 0), [0, 0])
    return settings.get("divisor_override") is not None or (padded and not settings.get("count_include_pad", True))
