"""A linear layer in float behind a norm that a lowered model returns (an embedding): it rotates back what a rotation of
the residual stream left turned. See `cptv_ao.transforms.stream_rotation`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.stream_rotation import outlying_streams
from cptv_ao.transforms.turned_streams import idle_layer

#: Name of the first such layer.
NAME = "rotated_back"


def has_place(model: GraphModule, end: str, path: str) -> bool:
    """Whether a layer is behind a node at this path, or can be put there."""
    known = any(node.name == end for node in model.graph.nodes)
    return known and (ends_turned(model).get(path) == end or (path.isidentifier() and not hasattr(model, path)))


def put_behind(model: GraphModule, end: str, path: str, layer: nn.Linear) -> None:
    """Put a linear layer behind a node of a graph."""
    node = next(one for one in model.graph.nodes if one.name == end)
    setattr(model, path, layer)
    with model.graph.inserting_after(node):
        behind = model.graph.call_module(path, (node,))
    node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    model.recompile()


def take_out(model: GraphModule, path: str) -> None:
    """Take such a layer out again."""
    node = next(one for one in model.graph.nodes if one.op == "call_module" and one.target == path)
    node.replace_all_uses_with(node.all_input_nodes[0])
    model.graph.erase_node(node)
    delattr(model, path)
    model.recompile()


def ends_turned(model: GraphModule) -> dict[str, str]:
    """Linear layers in float whose output is that of the model, square ones, by path, with the node that each reads."""
    modules, found = dict(model.named_modules()), dict[str, str]()
    for node in model.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        returned = all(user.op == "output" for user in node.users)
        if type(layer) is nn.Linear and returned and layer.in_features == layer.out_features:
            found[str(node.target)] = node.all_input_nodes[0].name
    return found


class ReturnedNorms:
    """Layers that are there while a model is refined, and stay where they turn something.

    Args:
        model: a converted one.
    """

    def __init__(self, model: GraphModule) -> None:
        self._model = model
        self._paths = list[str]()

    def open(self, backend: Backend, few: Batch, world: World) -> None:
        """Put a layer behind each norm that is returned, and reads a stream that is worth a rotation.

        Args:
            backend: of the model.
            few: images that show it.
        """
        for found in outlying_streams(backend, few, world):
            for reader in found.stream.readers:
                if not reader.layers:
                    path = free_name(self._model)
                    put_behind(self._model, reader.end, path, _idle(found.stream.width))
                    self._paths.append(path)

    @property
    def notes(self) -> list[str]:
        """What is said of those that turn something."""
        return [
            f"{path}, a linear layer in float that is new, rotates back what a norm returns: the state_dict has its "
            "weight and bias, so it is save_scales that carries everything to another conversion"
            for path in self._paths
            if not self._is_idle(path)
        ]

    def close(self) -> None:
        """Take out those that turn nothing."""
        for path in self._paths:
            if self._is_idle(path):
                take_out(self._model, path)
        self._paths.clear()

    def _is_idle(self, path: str) -> bool:
        weight = fetch(self._model, path).weight
        return torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype))


def _idle(width: int) -> nn.Linear:
    return idle_layer(width).requires_grad_(False).eval()


def free_name(model: nn.Module) -> str:
    """A name that no attribute of a model has."""
    number, name = 0, NAME
    while hasattr(model, name):
        number += 1
        name = f"{NAME}_{number}"
    return name


@contextmanager
def returned_norms(model: GraphModule) -> Iterator[ReturnedNorms]:
    """While the context lasts, layers may be put behind norms."""
    norms = ReturnedNorms(model)
    try:
        yield norms
    finally:
        norms.close()


@contextmanager
def with_layers(model: GraphModule, wanted: Mapping[str, str], widths: Mapping[str, int]) -> Iterator[None]:
    """Have such layers at the ends of a model as another conversion of it has; on an error those that were there.

    Args:
        wanted: nodes by path, see `ends_turned`.
        widths: of these layers, by path.
    """
    before = ends_turned(model)
    taken = {path: (end, fetch(model, path)) for path, end in before.items() if path not in wanted}
    put = [path for path in wanted if path not in before]
    done = list[str]()
    try:
        for path in taken:
            take_out(model, path)
        for path in put:
            put_behind(model, wanted[path], path, _idle(widths[path]))
            done.append(path)
        yield
    except BaseException:
        for path in done:
            take_out(model, path)
        for path, (end, layer) in taken.items():
            put_behind(model, end, path, layer)
        raise
