"""From a lowered graph to the float graph of the twin. Nodes keep their names.

Before: quantize_per_tensor(x, s, z) -> nnq.Linear -> quantized.add(a, b, s, z) -> dequantize
After:  Quantizer(x)                 -> QuantizedLayer   -> Sum(a, b)                 -> OnCodes(dequantize)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.fx.op_table import AVG_POOL
from cptv_ao.fx.ops import of_module, op_name, op_of
from cptv_ao.fx.quantized_ops import is_quantized_op, of_node, quantized_inside
from cptv_ao.simulation.builder import Builder
from cptv_ao.simulation.calls import pure, told, unsupported
from cptv_ao.simulation.kernel_call import kernel_call
from cptv_ao.simulation.kernel_doubts import divides_otherwise
from cptv_ao.simulation.qtensor_ops import OnCodes
from cptv_ao.simulation.quantized_calls import QuantizedCalls

# Arguments of torch's average pools.
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


class LoweredBuilder(Builder):
    """Ordinary ops on values that may be quantized; quantized ones are made by `QuantizedCalls`.

    Args:
        engine: the quantized engine whose arithmetic is followed; QNNPACK's differs from the others'.
        by_kernel: the nodes whose kernels are to compute.
    """

    def __init__(self, backend: Backend, engine: str, by_kernel: Collection[str] = ()) -> None:
        super().__init__(backend)
        self._by_kernel = by_kernel
        self._qnnpack = engine == "qnnpack"
        self._quantized = QuantizedCalls(backend, self._sites, self._qnnpack)

    @property
    def notes(self) -> list[str]:
        """Where a kernel is in doubt."""
        return self._quantized.notes

    def _add(self, node: Node) -> None:
        if node.name not in self._by_kernel:
            try:
                return self._add_known(node)
            except UnsupportedModelError:
                pass
        self._call(node, *kernel_call(node, self._model, self._modules, self._sites.output(node.name)))

    def _add_known(self, node: Node) -> None:
        if node.op == "call_module":
            self._module(node, self._modules[str(node.target)])
        elif node.op == "call_function":
            self._function(node)
        elif node.op == "call_method":
            self._method(node)
        else:
            self._copy(node)

    def _module(self, node: Node, module: nn.Module) -> None:
        known = of_node(node, self._modules)
        if known is not None:
            self._call(node, *self._quantized.of_module(node, module, known))
            return
        name = told(node, self._modules)
        if any(quantized_inside(str(node.target), module)):
            raise unsupported(node, name)
        # A float module sees quantized values too (ReLU, MaxPool2d): it is lifted like a function.
        own = _out_of_place(module)
        self._check_pool(node, vars(own))
        self._call(node, OnCodes(name, of_module(own), own))

    def _function(self, node: Node) -> None:
        known = of_node(node, self._modules)
        if node.target is torch.quantize_per_tensor:
            self._call(node, *self._quantized.of_quantize(node))
        elif known is not None:
            self._call(node, *self._quantized.of_function(node, known))
        elif is_quantized_op(node):
            raise unsupported(node, told(node, self._modules))
        else:
            self._lift(node, *pure(node, None))

    def _method(self, node: Node) -> None:
        method, args, kwargs = pure(node, None)
        function = getattr(torch.Tensor, str(method), None)
        if function is None:
            raise unsupported(node, str(method))
        self._lift(node, function, args, kwargs)

    def _lift(self, node: Node, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._check_pool(node, dict(zip(_POOL, node.args, strict=False)) | node.kwargs)
        if node.all_input_nodes:
            self._call(node, OnCodes(op_name(node), op_of(node, self._modules), function), args, kwargs)
        else:
            self._copy(node)

    def _check_pool(self, node: Node, settings: Mapping[str, Any]) -> None:
        op = op_of(node, self._modules)
        if self._qnnpack and op is AVG_POOL and divides_otherwise(settings):
            raise unsupported(node, f"{told(node, self._modules)} of QNNPACK with these settings")


def _out_of_place(module: nn.Module) -> nn.Module:
    """A copy of a float module that writes into none of its inputs."""
    own = copy.deepcopy(module)
    for part in own.modules():
        if hasattr(part, "inplace"):
            cast(Any, part).inplace = False
    return own
