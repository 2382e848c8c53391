"""Rewriting a module's `forward` into one that torch.fx can trace: its own graph, taken with example inputs at hand.

Where Python asks for a concrete value (`if H % 2`, `len(x)`, `int(n)`), the example answers, if that follows from the
form of the inputs and not from the numbers in them; all else stays symbolic. What depends on parameters alone is
computed once and kept as a constant.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.fx import GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.nn import functional

from cptv_ao.core.output_tree import named_tensors
from cptv_ao.fx.known_functions import aten_name
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.float_model.constant_folding import FOLDED, fold

#: Functions with a weight, which prepare_fx quantizes where it stands in its place among the arguments.
WEIGHTED_FUNCTIONS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
# Modes of interpolate that have quantized kernels.
_QUANTIZED_MODES = {"nearest", "nearest-exact", "bilinear"}
# Functions that are given a size number by number, or as a whole.
_SIZED = ("empty", "ones", "rand", "randn", "zeros")
# Methods and functions that tell the form of a tensor, not its numbers; attributes do so unless they are tensors.
_OF_FORM = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_contiguous",
    "is_floating_point", "is_complex", "get_device",
}  # fmt: skip
# Their arguments in order, with defaults.
_ARGUMENTS = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def rewrite(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Replace the `forward` of a module by the graph of what it does with inputs like these, in place.

    Raises:
        Exception: whatever tracing ran into; the module is then as before.
    """
    code = graph_of(module, args, kwargs)
    module.forward = MethodType(type(code).forward, module)  # type: ignore[method-assign]


def undo(module: nn.Module) -> None:
    """Give a module its own `forward` back."""
    module.__dict__.pop("forward", None)
    for name in [name for name in module._parameters if name.startswith(FOLDED)]:
        delattr(module, name)


def graph_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
    """The graph of a module for inputs like these; constants that it needs are registered on the module."""
    tracer = _ExampleTracer(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    with _sizes_as_a_whole():
        graph = tracer.trace(copy.deepcopy(module))  # it may cache what it computes, which would be proxies
    fold(graph, tracer.value, module)
    for node in graph.nodes:
        if node.target in WEIGHTED_FUNCTIONS and node.kwargs:
            _make_positional(node)
        if is_float_interpolation(node):
            node.target = interpolate_float
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:  # of the copy that was traced
            graph.erase_node(node)
    code = GraphModule(module, graph)
    code.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in {"placeholder", "output"})
    code.recompile()
    return code


@contextmanager
def _sizes_as_a_whole() -> Iterator[None]:
    """Have `torch.ones(n, m)` and the like take proxies, too, as they do in `torch.ones((n, m))`."""
    given = {name: getattr(torch, name) for name in _SIZED}
    try:
        for name, function in given.items():
            setattr(torch, name, partial(_sized, function))
        yield
    finally:
        for name, function in given.items():
            setattr(torch, name, function)


def _sized(function: Callable[..., Any], *size: Any, **settings: Any) -> Any:
    one_by_one = len(size) > 1 and any(isinstance(part, Proxy) for part in size)
    return function(size, **settings) if one_by_one else function(*size, **settings)


def is_float_interpolation(node: Node) -> bool:
    """Whether a node interpolates in a mode that has no quantized kernel."""
    if node.target is not functional.interpolate:
        return False
    mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")
    return mode not in _QUANTIZED_MODES


def interpolate_float(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.interpolate` under a name that convert_fx does not know, so that it stays float."""
    if torch.overrides.has_torch_function_unary(value):
        result: Tensor = torch.overrides.handle_torch_function(interpolate_float, (value,), value, *args, **kwargs)
        return result
    return functional.interpolate(value, *args, **kwargs)


class _ExampleTracer(QuantizationTracer):
    """Traces as prepare_fx does, and computes the value of each node for the example beside it."""

    proxy_buffer_attributes = True

    def __init__(self, example: Mapping[str, Any]) -> None:
        super().__init__([], [])
        self._example = example
        self._computing = False
        self._values: dict[Node, Any] = {}
        self._of_numbers: set[Node] = set()  # what follows from the numbers in the inputs

    def value(self, node: Node) -> Any:
        """What a node is for the example."""
        if node not in self._values:
            if node.op != "get_attr":  # those of buffers and constants are made without a proxy
                raise KeyError(f"no value for {node.op} {node.name}")
            self._values[node] = fetch(self.root, str(node.target))
        return self._values[node]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Placeholders for what is given; switches (None, bool, str) and defaults keep their value."""
        parameters = self._inputs(root_fn)
        given: list[Any] = []
        named = [place for place, parameter in enumerate(parameters, 1) if parameter.name in self._example]
        for parameter in parameters:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            proxy = self.create_proxy("placeholder", parameter.name, default, {})
            value = self._example.get(parameter.name, parameter.default)
            self._values[proxy.node] = value
            self._of_numbers |= {proxy.node} if named_tensors(value) else set()
            switch = parameter.name not in self._example or value is None or isinstance(value, (bool, str))
            given.append(value if switch else proxy)
        return root_fn, [self.root, *given[: max(named, default=0)]]  # a decorator may give what follows by keyword

    def _inputs(self, forward: Callable[..., Any]) -> list[inspect.Parameter]:
        """The parameters by place; further ones (*args, **kwargs, by keyword alone) must not be given."""
        found = []
        for parameter in list(inspect.signature(forward).parameters.values())[1:]:
            if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
                found.append(parameter)
            elif self._example.get(parameter.name):
                raise TypeError("a forward that is given *args, **kwargs or keyword-only arguments cannot be rewritten")
        return found

    def proxy(self, node: Node) -> Proxy:
        return _ExampleProxy(node, self)

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        node = proxy.node
        if kind not in {"placeholder", "output"}:
            self._values[node] = self._compute(node)
            if self._of_numbers.intersection(node.all_input_nodes) and not self._asks_form(node):
                self._of_numbers.add(node)
        return proxy

    def create_arg(self, a: Any) -> Any:
        """As a call of its class what is a dict and more, as the outputs of transformers: torch makes it a dict."""
        if isinstance(a, dict) and is_dataclass(a):
            given = {field.name: getattr(a, field.name) for field in fields(a)}
            return self.create_proxy("call_function", type(a), (), given).node
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.concrete(obj.node))

    def concrete(self, node: Node) -> Any:
        """What Python decides by: the value of a node for the example, if it is the same for all inputs of its form.

        Raises:
            TypeError: it follows from the numbers in the inputs.
        """
        if node in self._of_numbers:
            raise TypeError(f"what it does hangs on the numbers in its inputs, not on their form alone ({node.name})")
        return self.value(node)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(self.value(obj.node)))])  # type: ignore[index]

    def _asks_form(self, node: Node) -> bool:
        """Whether a node tells no more of tensors than their form, or takes something else from beside them."""
        if node.target in (getattr, len):
            return not isinstance(self._values[node], Tensor)
        if node.target is operator.getitem:
            return not isinstance(self.value(node.all_input_nodes[0]), Tensor) and not named_tensors(self._values[node])
        return node.op in {"call_function", "call_method"} and aten_name(node.target) in _OF_FORM

    def _compute(self, node: Node) -> Any:
        args: Any = map_arg(node.args, self.value)
        kwargs: Any = map_arg(node.kwargs, self.value)
        self._computing = True
        try:
            if node.op == "get_attr":
                return fetch(self.root, str(node.target))
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target)).forward(*args, **kwargs)
            if node.op == "call_method":
                value, *rest = args
                return getattr(value, str(node.target))(*rest, **kwargs)
            function: Any = node.target
            return function(*args, **kwargs)
        finally:
            self._computing = False


class _ExampleProxy(Proxy):
    """A proxy that turns into its example's value where Python insists on one: numbers, and what is no number."""

    tracer: _ExampleTracer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._value(), name, None)
        if isinstance(value, (torch.device, torch.dtype, str)):
            return value
        if value is None or callable(value):  # a method
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _value(self) -> Any:
        return self.tracer.value(self.node)

    def __len__(self) -> int:
        return len(self._value())

    def __int__(self) -> int:
        return int(self.tracer.concrete(self.node))

    def __index__(self) -> int:
        return operator.index(self.tracer.concrete(self.node))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self.node))


def _make_positional(node: Node) -> None:
    given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    last = max(i for i, name in enumerate(_ARGUMENTS) if name in given)
    node.args = tuple(given.get(name, default) for name, default in list(_ARGUMENTS.items())[: last + 1])
    node.kwargs = {}
