"""Rooms that the graph of a twin is built with: arguments of quantized functions, doubts about kernels, calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

from cptv_ao.core.errors import UnsupportedModelError
from cptv_ao.simulation.calls import pure, told
from cptv_ao.simulation.kernel_doubts import divides_otherwise
from cptv_ao.simulation.quantized_arguments import bound, scale_places


def _owner() -> nn.Module:
    owner = nn.Module()
    owner.register_buffer("s", torch.tensor(0.5))
    owner.register_buffer("z", torch.tensor(3))
    owner.register_buffer("w", torch.ones(4))
    return owner


def _norm(by_name: bool) -> Node:
    graph = Graph()
    x, w, s, z = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("s"), graph.get_attr("z")
    named = {"output_scale": s, "output_zero_point": z}
    given = (x, [4], w, None, 1e-5)
    args, kwargs = (given, named) if by_name else ((*given, s, z), {})
    return graph.call_function(torch.ops.quantized.layer_norm, args, kwargs)


@pytest.mark.parametrize("by_name", [False, True])
def test_settings_are_told_from_the_value_and_the_output_qparams(by_name: bool) -> None:
    node = _norm(by_name)
    value, settings = bound(node, _owner())
    assert value.name == "x"
    assert list(settings) == ["normalized_shape", "weight", "bias", "eps"]
    assert settings["weight"].target == "w"


def test_the_scale_comes_before_the_zero_point_however_they_are_given() -> None:
    node = _norm(by_name=False)
    given = dict(enumerate(node.args))
    assert scale_places(given, _owner()) == [5, 6]
    assert scale_places({"z": given[6], "s": given[5]}, _owner()) == ["s", "z"]
    assert scale_places({0: given[2]}, _owner()) == [], "a weight is no scale"


@pytest.mark.parametrize(
    ("settings", "otherwise"),
    [
        ({}, False),
        ({"padding": (1, 1)}, False),
        ({"padding": (1, 1), "count_include_pad": False}, True),
        ({"padding": 0, "count_include_pad": False}, False),
        ({"divisor_override": 3}, True),
        ({"divisor_override": 3, "ceil_mode": True}, False),
    ],
)
def test_average_pools_that_qnnpack_computes_otherwise(settings: dict[str, Any], otherwise: bool) -> None:
    assert divides_otherwise(settings) is otherwise


def test_calls_are_taken_out_of_place_or_refused() -> None:
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    rectified = graph.call_function(nn.functional.relu, (x,), {"inplace": True})
    assert pure(rectified, None) == (nn.functional.relu, (x,), {"inplace": False})
    target, args, kwargs = pure(graph.call_function(torch.add, (x, y), {"out": x}), None)
    assert (target, args, kwargs) == (torch.add, (x, y), {})
    with pytest.raises(UnsupportedModelError, match="does not write in place") as caught:
        pure(graph.call_method("random_", (x,)), None)
    assert caught.value.node == "random_"
    assert told(rectified, {}) == "relu"


def _viewed(*shape: Any, **named: Any) -> Node:
    graph = Graph()
    return graph.call_method("view", (graph.placeholder("x"), *shape), named)


def test_a_view_asks_for_no_strides_unless_it_is_one_of_other_bytes() -> None:
    x = torch.arange(6.0).view(2, 3).t()
    for node in (_viewed(6), _viewed((6,)), _viewed(size=(6,))):
        method, args, kwargs = pure(node, None)
        assert torch.equal(getattr(x, method)(*args[1:], **kwargs), x.reshape(6)), node.format_node()
    graph = Graph()
    node = graph.call_function(torch.ops.aten.view.default, (graph.placeholder("x"), [6]))
    op, args, _ = pure(node, None)
    assert torch.equal(op(x, *args[1:]), x.reshape(6))
    for node in (_viewed(torch.int32), _viewed(dtype=torch.int32)):
        assert pure(node, None)[0] == "view"
