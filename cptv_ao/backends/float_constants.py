"""What a constant of a quantized graph may be in float: tensors of the float model, or what it makes of these alone.

A quantizer puts a constant on its scale where an op reads it: a position embedding once it is permuted, a class token
once it is repeated for each image, a bias table once it is indexed. Of these moves a module tells nothing, so all that
lead to the shape are tried; an exported float model computes what it makes of its constants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from cptv_ao.fx.paths import fetch

# A tensor with more dimensions (of size 1 not counted) is not permuted, and none is repeated along more of them.
_MOST_DIMS = 4


def float_tensors(model: nn.Module) -> list[Tensor]:
    """The floating parameters and buffers of a model, and what an exported one computes from its constants alone."""
    held = [*model.parameters(), *model.buffers()]
    if isinstance(model, GraphModule):
        held += _computed(model)
    return [tensor for tensor in held if tensor.is_floating_point()]


def rearranged(tensor: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """A tensor permuted, reshaped and repeated in all ways that give a shape; none twice, and not as it is."""
    given = tensor.detach().squeeze()
    if given.dim() > _MOST_DIMS or not given.numel():
        return
    wanted = [dim for dim, size in enumerate(shape) if size != 1]
    whole = given.numel() == torch.Size(shape).numel()
    for order in permutations(range(given.dim())):
        moved = given.permute(order)
        if whole:
            if list(order) != sorted(order):
                yield moved.reshape(tuple(shape))
        elif len(wanted) <= _MOST_DIMS + 1:
            for places in combinations(wanted, given.dim()):
                if [shape[place] for place in places] == list(moved.shape):
                    sizes = [shape[dim] if dim in places else 1 for dim in range(len(shape))]
                    yield moved.reshape(sizes).expand(tuple(shape))


def _computed(model: GraphModule) -> list[Tensor]:
    """Values of the nodes of an exported graph that depend on no input."""
    values: dict[Node, Tensor] = {}
    with torch.no_grad():
        for node in model.graph.nodes:
            if node.op == "get_attr":
                held = fetch(model, str(node.target))
                if isinstance(held, Tensor):
                    values[node] = held.detach()
            elif _is_pure(node) and all(source in values for source in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
                made = node.target(*args, **kwargs)
                if isinstance(made, Tensor):
                    values[node] = made
    return list(values.values())


def _is_pure(node: Node) -> bool:
    """Whether a node computes the same each time, and writes nothing."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
