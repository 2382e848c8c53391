"""Ops that hand the qparams of their first input on: where a quantized value really comes from."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping

import torch
from torch import nn
from torch.fx import Node

# torch ops whose quantized output keeps the qparams of their first input.
_PASS_METHODS = {
    "contiguous", "detach", "flatten", "permute", "repeat", "reshape", "squeeze", "transpose", "unsqueeze", "view",
    "relu", "relu_", "clamp", "expand", "chunk", "split", "unbind", "clone", "mean",
}  # fmt: skip
_PASS_FUNCTIONS = {
    "flatten", "transpose", "squeeze", "unsqueeze", "reshape", "permute", "narrow", "relu", "relu6", "hardtanh",
    "clamp", "max_pool1d", "max_pool2d", "interpolate", "channel_shuffle", "pixel_shuffle", "getitem", "dropout",
    "chunk", "split", "unbind", "boolean_dispatch", "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
}  # fmt: skip
_PASS_MODULES = {
    "Identity", "Dropout", "ReLU", "ReLU6", "Hardtanh", "MaxPool1d", "MaxPool2d", "Flatten", "PixelShuffle",
    "ChannelShuffle", "Upsample", "AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
}  # fmt: skip


def producer(node: Node, known: Container[Node], modules: Mapping[str, nn.Module]) -> Node:
    """Walk up through the ops that keep the qparams of their first input, to a node that is known or does not."""
    while node not in known and node.args and isinstance(node.args[0], Node) and _passes(node, modules):
        node = node.args[0]
    return node


def op_name(node: Node) -> str:
    """Short name of what a node calls: `quantized.add`, `quantize_per_tensor`, `flatten`."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target).replace("::", ".")
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).replace("::", ".")
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def _passes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_method":
        return str(node.target) in _PASS_METHODS
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__ in _PASS_MODULES
    return node.op == "call_function" and op_name(node) in _PASS_FUNCTIONS
