"""Which values of a graph share memory, and what is another value once a node has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, symbolic_trace

from cptv_ao.fx.aliasing import Memory


def memory(forward: Callable[..., Any]) -> tuple[Memory, dict[str, Node]]:
    graph: Graph = symbolic_trace(forward).graph
    return Memory(graph.nodes, lambda _: None), {node.name: node for node in graph.nodes}


def test_a_view_is_changed_with_what_is_under_it() -> None:
    def forward(x: Tensor) -> Tensor:
        view = x.view(-1)
        view.mul_(2)
        return x + view.sum()

    found, nodes = memory(forward)
    changed = found.changed_by(nodes["mul_"])
    assert changed is not None
    by_node = {change.node.name: [step.name for step in change.steps] for change in changed}
    assert by_node == {"view": [], "x": ["view"]}, "x is made again by writing through the view"


def test_a_view_that_was_taken_before_is_made_again() -> None:
    def forward(x: Tensor) -> Tensor:
        view = x.transpose(0, 1)
        x.mul_(2)
        return view + 1

    found, nodes = memory(forward)
    changed = found.changed_by(nodes["mul_"])
    assert changed is not None
    sources = {change.node.name: change.source and change.source.name for change in changed}
    assert sources == {"x": None, "transpose": "x"}


def test_what_may_be_a_copy_cannot_be_told() -> None:
    def forward(x: Tensor) -> Tensor:
        other = x.reshape(-1)
        other.mul_(2)
        return x + 1

    found, nodes = memory(forward)
    assert found.changed_by(nodes["mul_"]) is None


def test_beyond_what_may_be_a_copy_only_what_is_not_read_again_may_be_written() -> None:
    def index(x: Tensor) -> Tensor:  # BEiT's relative positions
        shifted = (x + 1).transpose(0, 1).contiguous()
        shifted[0].add_(2)
        return shifted

    found, nodes = memory(index)
    changed = found.changed_by(nodes["add_"])
    assert changed is not None
    by_node = {change.node.name: [step.name for step in change.steps] for change in changed}
    assert by_node == {"getitem": [], "contiguous": ["getitem"]}

    def by_another_name(x: Tensor) -> Tensor:
        own = x + 1
        row = own[1]
        flat = own.reshape(-1)
        flat.mul_(2)
        return row + flat.sum()

    found, nodes = memory(by_another_name)
    assert found.changed_by(nodes["mul_"]) is None, "whether the row is another one depends on the strides"


def test_a_value_of_its_own_changes_nothing_else() -> None:
    def forward(x: Tensor) -> Tensor:
        own = x + 1
        own.mul_(2)
        return own - x

    found, nodes = memory(forward)
    changed = found.changed_by(nodes["mul_"])
    assert changed is not None and [change.node.name for change in changed] == ["add"]


def test_a_plus_in_front_is_the_same_memory() -> None:
    def forward(x: Tensor) -> Tensor:
        y = +x
        y.mul_(2)
        return x + y

    found, nodes = memory(forward)
    changed = found.changed_by(nodes["mul_"])
    assert changed is not None and {change.node.name for change in changed} == {"x", "pos"}


@pytest.mark.parametrize(("again", "wanted"), [(True, True), (False, False)])
def test_what_is_read_later_by_any_name(again: bool, wanted: bool) -> None:
    def forward(x: Tensor) -> Tensor:
        view = x.view(-1)
        y = torch.relu(x)
        return y + view if again else y

    found, nodes = memory(forward)
    assert found.read_later(nodes["relu"]) == wanted


def test_two_names_of_one_memory_that_is_written_are_shared() -> None:
    def forward(x: Tensor) -> Tensor:
        a = x + 1
        b = a.view(-1)
        c = b * 2
        a.mul_(3)
        return c.sum() + a

    found, nodes = memory(forward)
    order = list(nodes.values())
    pair = (nodes["add"], nodes["view"])
    assert found.shared(pair, order.index(nodes["mul"]))
    assert not found.shared(pair, order.index(nodes["mul_"]) + 1), "nothing is written behind it"
    assert not found.shared((nodes["x"], nodes["add"]), 0)


@pytest.mark.parametrize(("module", "same"), [(nn.Identity(), True), (nn.Flatten(), False), (nn.Linear(2, 2), False)])
def test_a_module_that_returns_its_very_input(module: nn.Module, same: bool) -> None:
    traced = symbolic_trace(nn.Sequential(module))
    found = Memory(traced.graph.nodes, lambda node: module if node.op == "call_module" else None)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert found.is_same(node) == same
