"""Where a model cannot be traced, or its graph not be converted."""

from __future__ import annotations

import traceback

from torch import nn
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.fx import Graph

from cptv_ao.transforms.float_model.example_tracer import WEIGHTED_FUNCTIONS, is_float_interpolation


def innermost(error: BaseException, model: nn.Module) -> str:
    """Path of the innermost module that an exception passed through; "" is the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = paths.get(id(frame.f_locals.get("self")), found)
    return found


def first_line(error: BaseException) -> str:
    """What an error is and says, as far as a note has room."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def not_convertible(graph: Graph, tracer: QuantizationTracer) -> tuple[str, str] | None:
    """Path of a module whose graph convert_fx would break on, and the reason."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        scope = tracer.node_name_to_scope[node.name][0] if node.name in tracer.node_name_to_scope else ""
        if node.op == "call_function" and node.target in WEIGHTED_FUNCTIONS:
            weights = node.args[1:3]
            if node.kwargs or not all(w is None or (hasattr(w, "op") and w.op == "get_attr") for w in weights):
                return scope, f"{node.target.__name__} with keyword arguments or a computed weight or bias"
        if is_float_interpolation(node):
            return scope, "interpolate in a mode that has no quantized kernel stays float"
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in called:
            user = next(iter(node.users), node)
            scope = tracer.node_name_to_scope.get(user.name, (scope, None))[0]
            return scope, f"reads {node.target}, which convert_fx replaces"
    return None
