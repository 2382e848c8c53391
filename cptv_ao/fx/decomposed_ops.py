"""The quantize and dequantize ops of PT2E graphs, by identity.

`torch.ao` or `torchao` registers them when it is imported, so they are looked up when they are asked for; where nobody
has, no graph holds one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def packet_of(target: Any) -> torch._ops.OpOverloadPacket | None:
    """The op of torch.ops that is called, whichever its overload; None of other functions."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return packet if isinstance(packet, torch._ops.OpOverloadPacket) else None


def called(node: Node) -> Any:
    """The function or op that a node calls, whichever its overload."""
    return packet_of(node.target) or node.target


def is_of(target: Any, *namespaces: Any) -> bool:
    """Whether an op is one of those of these namespaces of torch.ops."""
    packet = packet_of(target)
    return packet is not None and any(getattr(space, packet.__name__, None) is packet for space in namespaces)


def is_decomposed(node: Node) -> bool:
    """Whether a node quantizes or dequantizes, or computes a scale."""
    return node.op == "call_function" and is_of(node.target, torch.ops.quantized_decomposed)


def calls(target: Any, *names: str) -> bool:
    """Whether one of these ops is called, with whichever overload."""
    packet = packet_of(target)
    return packet is not None and any(_op(name) is packet for name in names)


def calls_default(node: Node, name: str) -> bool:
    """Whether a node calls this op with scales that are plain numbers, or one tensor for all channels."""
    op = _op(name)
    return op is not None and node.target is op.default


def _op(name: str) -> Any:
    return getattr(torch.ops.quantized_decomposed, name, None)
