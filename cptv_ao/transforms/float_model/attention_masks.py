"""Sums of attention scores and masks, which no range of some hundred codes can hold.

A mask is so far below 0 that a softmax sees nothing of what it lies on: one step of a range that holds it is more than
all that the softmax does see.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from cptv_ao.fx.known_functions import aten_name
from cptv_ao.fx.op_table import SOFTMAX
from cptv_ao.fx.ops import op_of
from cptv_ao.transforms.float_model.example_runs import ExampleRun

# A softmax sees nothing of what lies so far below the other scores: 2e-22 of them.
_FAR = 50.0
_SUMS = {
    operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_",
}  # fmt: skip
_FILLS = {"masked_fill", "where"}
# So many nodes may lie between a sum and its softmax: another bias, a view, a dropout.
_BETWEEN = 6


def masked_scores(run: ExampleRun) -> dict[Node, None]:
    """The nodes that add a mask to scores or fill it into them, with what makes the mask, and all behind them up to the
    softmax, and that.

    Args:
        run: of a graph on an example.
    """
    modules = dict(run.module.named_modules(remove_duplicate=False))
    given: set[Node] = set()  # floats that follow from integers and from what the model holds alone
    found: dict[Node, None] = {}
    for node in run.graph.nodes:
        if _is_given(node, given, run):
            given.add(node)
        elif _masks(node, given, run) and (way := _to_softmax(node, modules)):
            found |= dict.fromkeys([*_makes(node, given), *way])
    return found


def _makes(node: Node, given: set[Node]) -> Iterator[Node]:
    """What the mask that a node adds is made by."""
    for part in node.all_input_nodes:
        if part in given and part.op != "get_attr":
            yield from _makes(part, given)
            yield part


def _is_given(node: Node, given: set[Node], run: ExampleRun) -> bool:
    """Whether a node's value follows from no activations, nor from weights that integers look up."""
    if node.op == "get_attr":
        return _is_mask(node, run) and bool(run.env[node].any())
    if node.op not in ("call_function", "call_method"):
        return False
    floats = [part for part in node.all_input_nodes if _floats(run.env.get(part)) is not None]
    return (bool(floats) or run.takes_integers(node)) and given.issuperset(floats)


def _is_mask(node: Node, run: ExampleRun) -> bool:
    """Whether a value is 0, or far from it where nothing is to be seen."""
    value = _floats(run.env.get(node))
    return value is not None and any(bool(((value == 0) | (sign * value >= _FAR)).all()) for sign in (-1, 1))


def _masks(node: Node, given: set[Node], run: ExampleRun) -> bool:
    """Whether a node puts a mask onto scores."""
    if node.target in _SUMS:
        return any(part in given and _is_mask(part, run) for part in node.all_input_nodes)
    if node.op == "call_module" or aten_name(node.target) not in _FILLS or not run.takes_integers(node):
        return False
    return any(
        _is_far(run.env.get(put) if isinstance(put, Node) else put) for put in (*node.args, *node.kwargs.values())
    )


def _floats(value: Any) -> Tensor | None:
    """A value that is a tensor of floats, and no single number."""
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.dim() else None


def _is_far(value: Any) -> bool:
    """Whether it is a single number, far below 0."""
    if isinstance(value, Tensor):
        return not value.dim() and value.is_floating_point() and float(value) <= -_FAR
    return isinstance(value, (int, float)) and value <= -_FAR


def _to_softmax(node: Node, modules: Mapping[str, nn.Module]) -> tuple[Node, ...]:
    """A node and all up to the softmax that reads it, that included; none where there is no softmax."""
    ways: list[tuple[Node, ...]] = [(node,)]
    seen = {node}
    for _ in range(_BETWEEN + 2):
        for way in ways:
            if op_of(way[-1], modules) is SOFTMAX or way[-1].target is functional.scaled_dot_product_attention:
                return way
        further = [(*way, user) for way in ways for user in way[-1].users if user not in seen]
        seen.update(way[-1] for way in further)
        ways = further
    return ()
