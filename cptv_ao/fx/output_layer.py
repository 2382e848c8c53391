"""What a graph's output comes from: a layer with a weight, as logits do, or something else, as embeddings do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_unflatten

from cptv_ao.core.output_tree import children, named_leaves
from cptv_ao.fx import ops, quantized_ops
from cptv_ao.fx.decomposed_ops import called
from cptv_ao.fx.op_table import FLOAT_SCALINGS, FLOAT_SUMS, Op

_aten = torch.ops.aten
# Their output says what their input says to a softmax.
_LOG_SOFTMAX = {functional.log_softmax, torch.log_softmax, _aten.log_softmax, _aten._log_softmax}
# Of two values, and of a value and a number.
_PLUS: set[Any] = {*FLOAT_SUMS, _aten.add, torch.ops.quantized.add}
_TIMES: set[Any] = {*FLOAT_SCALINGS, _aten.mul, _aten.div, torch.ops.quantized.mul}
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
    """What computes a node's value, moved, rounded, averaged or turned at most; also where it is the mean or the sum of
    two heads (distilled classifiers)."""
    modules = dict(model.named_modules())
    node = _unscaled(node, modules)
    heads: Sequence[Any] = node.args[:2] if node is not None and _adds_two(node) else [node]
    ends = {_end_of(head, modules, turns) for head in heads}
    return ends.pop() if len(ends) == 1 else "other"


def _end_of(node: Node | None, modules: Mapping[str, nn.Module], turns: Turns) -> End:
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
        if not _brings(node, modules):
            return "other"
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return "other"


def _unscaled(node: Node | None, modules: Mapping[str, nn.Module]) -> Node | None:
    """What a node's value is of, times a number, if it is that at all, and of two added values."""
    found = node
    while found is not None and (_brings(found, modules) or _scales(found)):
        found = found.all_input_nodes[0] if found.all_input_nodes else None
    return found if found is not None and _adds_two(found) else node


def _brings(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a value is that of the node before, moved, rounded or averaged."""
    quantized, op = quantized_ops.of_node(node, modules), ops.op_of(node, modules)
    dequantizes = quantized is not None and quantized.role == "dequantizes"
    casts = node.op == "call_method" and node.target in _CASTS
    return dequantizes or casts or _passes(op) or _is_log_softmax(node, modules)


def _scales(node: Node) -> bool:
    """Whether it multiplies by a number, or divides by one."""
    given = [isinstance(part, Node) for part in node.args[:2]]
    return called(node) in _TIMES and given in ([True, False], [False, True])


def _adds_two(node: Node) -> bool:
    return called(node) in _PLUS and all(isinstance(part, Node) for part in node.args[:2])


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
    return called(node) in _LOG_SOFTMAX
