"""What a graph's output comes from: a layer with a weight, as logits do, or something else, as embeddings do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from cptv_ao.fx import ops, quantized_ops
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import Op

_aten = torch.ops.aten
# Their output says what their input says to a softmax.
_LOG_SOFTMAX = {functional.log_softmax, torch.log_softmax, _aten.log_softmax, _aten._log_softmax}
# Methods; of these a graph has nothing but the name.
_CASTS = {"double", "half", "bfloat16"}


def ends_in_layer(model: GraphModule) -> bool:
    """Whether the first output is what a layer with a weight computes, moved, rounded or averaged at most.

    Args:
        model: a quantized or a float graph.
    """
    modules = dict(model.named_modules())
    output = next(node for node in model.graph.nodes if node.op == "output")
    node = next((leaf for leaf in tree_leaves(output.args) if isinstance(leaf, Node)), None)
    while node is not None:
        quantized = quantized_ops.of_node(node, modules)
        if quantized is not None and quantized.product:
            return not quantized.after
        op = ops.op_of(node, modules)
        if op is not None and op.effect == "layer":
            return True
        dequantizes = quantized is not None and quantized.role == "dequantizes"
        casts = node.op == "call_method" and node.target in _CASTS
        if not (dequantizes or casts or _passes(op) or _is_log_softmax(node, modules)):
            return False
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return False


def _passes(op: Op | None) -> bool:
    return op is not None and (op.brings or op.effect in {"averages", "mean"})


def _is_log_softmax(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.LogSoftmax
    return node.op == "call_function" and (node.target in _LOG_SOFTMAX or packet_of(node.target) in _LOG_SOFTMAX)
