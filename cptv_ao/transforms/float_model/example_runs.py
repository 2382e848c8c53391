"""What a model and its parts are given and give when they run on an example."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from cptv_ao.core.output_tree import named_tensors

# Functions that get a scale of their own.
_QUANTIZABLE = {
    operator.add,
    operator.iadd,
    torch.add,
    operator.mul,
    operator.imul,
    torch.mul,
    torch.cat,
    torch.matmul,
    operator.matmul,
}


class ExampleRun(Interpreter):
    """Runs a graph and remembers what its nodes gave."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        super().__init__(GraphModule(model, graph), garbage_collect_values=False)

    def takes_integers(self, node: Node) -> bool:
        """Whether a function or method is given a tensor of integers or a mask."""
        given = [self.env.get(n) for n in node.all_input_nodes] if node.op in {"call_function", "call_method"} else []
        return any(isinstance(value, Tensor) and not value.is_floating_point() for value in given)

    def is_no_tensor(self, node: Node) -> bool:
        """Whether a function that prepare_fx quantizes is given or returns no tensor: sizes, a tuple of chunks."""
        if node.op != "call_function" or node.target not in _QUANTIZABLE:
            return False
        given = [self.env.get(part) for part in node.args[:2] if isinstance(part, Node)]
        return not all(isinstance(value, Tensor) for value in (*given, self.env.get(node)))


def compare(model: Callable[..., Any], inputs: tuple[Any, ...], expected: list[Tensor]) -> None:
    """Refuse a model whose outputs are not the expected ones."""
    got = tensors_of(model(*inputs))
    if len(expected) != len(got):
        raise RuntimeError(f"{len(got)} outputs in place of {len(expected)}")
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise RuntimeError(f"other outputs for inputs of shapes {_shapes(inputs)}")


def inputs_of(
    model: nn.Module, paths: list[str], example: tuple[Any, ...]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each of some modules is given when the model runs on the example."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path in found and _shapes((args, kwargs)) != _shapes(found[path]):
                raise RuntimeError("it is called with inputs of several shapes")
            found[path] = (args, kwargs)

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(remember(p), with_kwargs=True) for p in paths]
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shapes(value: Any) -> Any:
    return [tuple(t.shape) for t in tensors_of(value)]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dicts and dataclasses."""
    return list(named_tensors(value).values())


def another_batch(example: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(torch.cat([part, part[:1]]) if isinstance(part, Tensor) and part.dim() else part for part in example)
