"""The call of a model's own kernel in the place of a node that the twin has no arithmetic for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.fx.quantized_ops import is_quantized_op
from cptv_ao.simulation.by_kernel import ByKernel
from cptv_ao.simulation.calls import Call, told, unsupported
from cptv_ao.simulation.float_forms import float_form
from cptv_ao.simulation.quantized_arguments import scale_places
from cptv_ao.simulation.quantizers import Quantizer


def kernel_call(node: Node, model: nn.Module, modules: Mapping[str, nn.Module], output: Quantizer | None) -> Call:
    """The kernel of a node, which computes where the twin cannot, and what it is called with.

    Args:
        output: puts the result on its scale, where the node has an output scale of its own.

    Raises:
        UnsupportedModelError: the node calls nothing, or its scale is not found.
    """
    name, args, kwargs = told(node, modules), node.args, dict(node.kwargs)
    if node.op == "call_module":
        module = modules[str(node.target)]
        return Call(ByKernel(name, module, float_form(module), output), args, kwargs)
    if node.op not in ("call_function", "call_method"):
        raise unsupported(node, name)
    target: Any = node.target
    function = partial(_on_copy, getattr(torch.Tensor, target)) if node.op == "call_method" else target
    if output is None:
        return Call(ByKernel(name, function, None if is_quantized_op(node) else function), args, kwargs)
    places = scale_places(dict(enumerate(args)) | kwargs, model)
    if len(places) != 2:
        raise unsupported(node, name)
    args = tuple(None if place in places else value for place, value in enumerate(args))
    kwargs = {key: value for key, value in kwargs.items() if key not in places}
    return Call(ByKernel(name, function, None, output, places), args, kwargs)


def _on_copy(method: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of a tensor, which may work in place, on a copy of it."""
    return method(value.clone() if isinstance(value, Tensor) else value, *args, **kwargs)
