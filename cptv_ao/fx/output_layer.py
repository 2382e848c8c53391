"""What a graph's output comes from: a layer with a weight, as logits do, or something else, as embeddings do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_unflatten

from cptv_ao.core.output_tree import children, named_leaves
from cptv_ao.fx import ops, quantized_ops
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import Op

_aten = torch.ops.aten
# Their output says what their input says to a softmax.
_LOG_SOFTMAX = {functional.log_softmax, torch.log_softmax, _aten.log_softmax, _aten._log_softmax}
# Methods; of these a graph has nothing but the name.
_CASTS = {"double", "half", "bfloat16"}


#: What computes an output: a layer with a weight, a function whose values are between bounds, or something else.
End = Literal["layer", "bounded", "other"]


def output_nodes(model: GraphModule) -> dict[str, Node]:
    """The nodes of the outputs, by the names that `named_tensors` gives them."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    info = getattr(model.graph._codegen, "pytree_info", None)
    spec = None if info is None else info.out_spec
    value = output.args[0] if spec is None else tree_unflatten(tree_leaves(output.args), spec)
    return {name: leaf for name, leaf in named_leaves(_opened(value)).items() if isinstance(leaf, Node)}


def _opened(value: Any) -> Any:
    """With what a graph puts into named tuples and dataclasses in the place of the nodes that make these."""
    if isinstance(value, Node):
        kind: Any = value.target
        if value.op != "call_function" or not isinstance(kind, type):
            return value
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else getattr(kind, "_fields", ())
        return _opened({**dict(zip(names, value.args, strict=False)), **value.kwargs}) if names else value
    parts = children(value)
    return value if parts is None else {name: _opened(part) for name, part in parts}


Turns = Callable[[str], bool]
"""Whether the layer of a node, by its name, only turns what it reads."""


def end_of(model: GraphModule, node: Node | None, turns: Turns = lambda _: False) -> End:
    """What computes a node's value, moved, rounded, averaged or turned at most."""
    modules = dict(model.named_modules())
    while node is not None:
        quantized, op = quantized_ops.of_node(node, modules), ops.op_of(node, modules)
        if quantized is not None and quantized.product and quantized.after:
            return "other"
        if (quantized is not None and quantized.product) or (op is not None and op.effect == "layer"):
            if not turns(node.name):
                return "layer"
            node = node.all_input_nodes[0]
            continue
        if op is not None and op.effect == "fixed":
            return "bounded"
        dequantizes = quantized is not None and quantized.role == "dequantizes"
        casts = node.op == "call_method" and node.target in _CASTS
        if not (dequantizes or casts or _passes(op) or _is_log_softmax(node, modules)):
            return "other"
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return "other"


def ends_in_layer(model: GraphModule) -> bool:
    """Whether the first output is what a layer with a weight computes, moved, rounded or averaged at most.

    Args:
        model: a quantized or a float graph.
    """
    return end_of(model, next(iter(output_nodes(model).values()), None)) == "layer"


def _passes(op: Op | None) -> bool:
    return op is not None and (op.brings or op.effect in {"averages", "mean"})


def _is_log_softmax(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.LogSoftmax
    return node.op == "call_function" and (node.target in _LOG_SOFTMAX or packet_of(node.target) in _LOG_SOFTMAX)
