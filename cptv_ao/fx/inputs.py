"""What the inputs of a graph are: its placeholders, and how an exported graph takes nested ones apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_unflatten

from cptv_ao.core.intake import Intake
from cptv_ao.core.nested import Path, leaves


def taken(model: GraphModule) -> Intake:
    """The inputs that a traced graph takes. Those without a default are required, but for `*args` and `**kwargs`; an
    optional one that nothing reads is none."""
    nodes = _placeholders(model)
    plain = [node for node in nodes if not str(node.target).startswith("*")]
    names = [str(node.target) for node in nodes]
    return Intake(
        lambda keyword: any(name == keyword or name.startswith((f"{keyword}_", "**")) for name in names),
        tuple(str(node.target) for node in plain if not node.args),
        tuple(str(node.target) for node in plain if node.args and node.users),
    )


def taken_by_exported(model: GraphModule) -> Intake:
    """The inputs that an exported graph takes: all that were given when it was exported, nested as they were. Where it
    was exported without a dynamic batch it takes one number of images alone."""
    nodes = _placeholders(model)
    shapes = [_shape(node.meta.get("val")) for node in nodes]
    spec = getattr(model.graph._codegen, "pytree_info", None)
    if spec is None:
        names, args, kwargs = [str(node.target) for node in nodes], tuple(shapes), {}
    else:
        names = list(spec.orig_args)
        args, kwargs = tree_unflatten(shapes, spec.in_spec)
    return Intake(set(names).__contains__, tuple(names[: len(args)]), shapes=dict(_by_path(names, args, kwargs)))


def unlike_exported(model: Any, tensors: Iterable[Tensor]) -> bool:
    """Whether tensors, in the order of the inputs of an exported graph, have other shapes than it was exported for."""
    nodes = _placeholders(model) if isinstance(model, GraphModule) else []
    shapes = [shape.sizes for node in nodes if (shape := _shape(node.meta.get("val"))) is not None]
    given = [tuple(tensor.shape) for tensor in tensors if tensor.dim()]
    return len(shapes) == len(given) and any(
        len(wanted) != len(got) or any(a not in (None, b) for a, b in zip(wanted, got, strict=True))
        for wanted, got in zip(shapes, given, strict=True)
    )


def _placeholders(model: GraphModule) -> list[Node]:
    return [node for node in model.graph.nodes if node.op == "placeholder"]


@dataclass(frozen=True)
class _Shape:
    """A leaf among nested inputs."""

    sizes: tuple[int | None, ...]


def _shape(example: Any) -> _Shape | None:
    """Of a tensor that has dimensions; symbols, in whose place any number will do, are None."""
    if not isinstance(example, Tensor) or not example.dim():
        return None
    return _Shape(tuple(size if isinstance(size, int) else None for size in example.shape))


def _by_path(names: list[str], args: Any, kwargs: Any) -> Iterator[tuple[Path, tuple[int | None, ...]]]:
    """Shapes by where an input stands: positional ones may be given by keyword, too."""
    for path, shape in (*leaves(args), *leaves(kwargs)):
        if shape is not None:
            yield path, shape.sizes
            if isinstance(path[0], int):
                yield (names[path[0]], *path[1:]), shape.sizes
