"""What the inputs of a graph are: its placeholders, and how an exported graph takes nested ones apart."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx._pytree import tree_flatten_spec
from torch.utils._pytree import tree_unflatten

from cptv_ao.core.intake import Intake
from cptv_ao.core.nested import Path, leaves

# What takes a value apart that is no tensor, or may be none.
_TAKES = {operator.getitem, getattr}


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
        nested={str(node.target): 0 for node in plain if _keys(node)},
        plain=frozenset(str(node.target) for node in plain if not any(user.target in _TAKES for user in node.users)),
    )


def _keys(node: Node) -> bool:
    """Whether an input is asked for values by name, which a tensor is not."""
    taken = [user for user in node.users if user.target is operator.getitem]
    return bool(taken) and all(isinstance(user.args[1], str) for user in taken)


def taken_by_exported(model: GraphModule) -> Intake:
    """The inputs that an exported graph takes: all that were given when it was exported, nested as they were. Where it
    was exported without a dynamic batch it takes one number of images alone."""
    nodes = _placeholders(model)
    shapes = [_shape(node.meta.get("val")) for node in nodes]
    spec = getattr(model.graph._codegen, "pytree_info", None)
    if spec is None:
        names, args, kwargs = [str(node.target) for node in nodes], tuple[Any, ...](shapes), {}
    else:
        names = list(spec.orig_args)
        args, kwargs = tree_unflatten(shapes, spec.in_spec)
    nested = {
        name: 0 if isinstance(value, Mapping) else len(value)
        for name, value in zip(names, args, strict=False)
        if isinstance(value, (Mapping, list, tuple))
    }
    return Intake(
        set(names).__contains__,
        tuple(names[: len(args)]),
        shapes=dict(_by_path(names, args, kwargs)),
        nested=nested,
        plain=frozenset(names) - set(nested),
    )


def taken_apart(
    model: GraphModule, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> tuple[Iterable[Any], Mapping[str, Any]]:
    """Inputs for the placeholders: an exported graph has one for each leaf of those that it was exported for."""
    info = getattr(model.graph._codegen, "pytree_info", None)
    if info is None:
        return args, kwargs
    given = dict(zip(info.orig_args, args, strict=False)) | dict(kwargs)
    positional = len(tree_unflatten(range(info.in_spec.num_leaves), info.in_spec)[0])
    values = [given[name] for name in info.orig_args if name in given]
    named = dict(zip(info.orig_args[positional:], values[positional:], strict=False))
    return tree_flatten_spec((tuple(values[:positional]), named), info.in_spec), {}


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
