"""Functions and modules are known by identity: a name that is like one of torch's says nothing."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.quantized as nnq
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional

from cptv_ao.fx.inplace import is_known, may_write, out_of_place, written
from cptv_ao.fx.known_functions import aten_name, is_listed_module


def relu_(x: Tensor) -> Tensor:
    return x + 1


def view(x: Tensor) -> Tensor:
    return x + 1


relu_.__module__ = view.__module__ = "torch.nn.functional"


def called(target: Callable[..., Any], **kwargs: Any) -> Node:
    graph = Graph()
    return graph.call_function(target, (graph.placeholder("x"),), kwargs)


@pytest.mark.parametrize(
    "function",
    [torch.relu, functional.hardtanh_, torch.Tensor.exp, torch.nn.init.zeros_, operator.iadd, torch.special.expit, len],
)
def test_functions_of_torch_and_python_are_known(function: Callable[..., Any]) -> None:
    assert is_known(called(function), None)


@pytest.mark.parametrize("function", [relu_, view])
def test_a_function_of_the_users_with_a_name_of_torch_is_not(function: Callable[..., Any]) -> None:
    node = called(function)
    assert not is_known(node, None) and may_write(node, None)
    assert written(node, None) is None and aten_name(function) == ""


@pytest.mark.parametrize(
    ("target", "pure"),
    [
        (torch.relu_, torch.relu),
        (functional.hardtanh_, functional.hardtanh),
        (functional.elu_, functional.elu),
        (operator.imul, operator.mul),
        (torch.Tensor.add_, torch.add),
        (torch.Tensor.__iadd__, torch.Tensor.__add__),
        (torch.ops.aten.relu_.default, torch.ops.aten.relu.default),
        (torch.ops.aten.relu_, torch.ops.aten.relu),
        ("add_", "add"),
        ("__imul__", "__mul__"),
    ],
)
def test_what_writes_into_its_first_input(target: Any, pure: Any) -> None:
    graph = Graph()
    given = graph.placeholder("x")
    node = (graph.call_method if isinstance(target, str) else graph.call_function)(target, (given, 1.0))
    assert written(node, None) is given
    assert out_of_place(target) == pure, "what returns the same and leaves the input"


@pytest.mark.parametrize("target", [torch.relu, functional.elu, operator.mul, torch.ops.aten.relu.default, "add"])
def test_what_leaves_its_input(target: Any) -> None:
    graph = Graph()
    given = graph.placeholder("x")
    node = (graph.call_method if isinstance(target, str) else graph.call_function)(target, (given, 1.0))
    assert written(node, None) is None and not may_write(node, None)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("view", "view"),
        (torch.flatten, "flatten"),
        (torch.Tensor.positive, "positive"),
        (operator.pos, "positive"),
        (torch.ops.aten.view.default, "view"),
        (torch.ops.aten.view, "view"),
        (torch.ops.quantized.add, ""),
        (operator.add, ""),
    ],
)
def test_the_op_behind_a_function(target: Any, name: str) -> None:
    assert aten_name(target) == name


def test_modules_are_known_with_their_parts_and_their_subclasses_are_not() -> None:
    like_linear = type("Linear", (nn.Linear,), {"__module__": "torch.nn.modules.linear"})
    parts = [part for made in (nnq.Linear(2, 2), nn.MultiheadAttention(2, 1)) for part in made.modules()]
    assert all(map(is_listed_module, parts))
    assert not is_listed_module(like_linear(2, 2))


def test_what_torch_export_puts_into_a_graph_is_known() -> None:
    exporter = importlib.import_module("torch.export._unlift")
    if not hasattr(exporter, "GuardsFn"):
        pytest.skip("this torch puts nothing there")
    assert is_listed_module(exporter.GuardsFn())
