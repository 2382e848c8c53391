"""Values of a lowered graph whose channels can be scaled as one: the layers that make them and those that read them
make up for it.

    conv -> relu -> conv:                 one group, of what the first gives
    conv -> (+ x) -> conv, x from a conv: one group, of both and the sum
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.op_table import DEQUANTIZE, DROPOUT, FLATTEN, IDENTITY, MAX_POOL, MEAN, QUANTIZE, RELU, RELU6
from cptv_ao.fx.ops import op_of
from cptv_ao.fx.quantized_ops import SUMS, Quantized, of_node
from cptv_ao.fx.readers import reads
from cptv_ao.transforms.lone_sites import CLIPS, LoneSites

# What gives just what it reads.
_PASSING = (DEQUANTIZE, DROPOUT, IDENTITY, QUANTIZE)
# What gives the scaled values for scaled ones, ReLU6 where nothing reaches its upper end; and so do averages.
_HOMOGENEOUS = (*_PASSING, FLATTEN, MAX_POOL, MEAN, RELU, RELU6)
_LAYERS, _AFTER = ("linear", "conv"), ("", "relu", "leaky_relu")


@dataclass(frozen=True)
class Output:
    """Sites of a group's values that move as one.

    Attributes:
        node: that gives the values.
        low, high: between which they are let through.
    """

    sites: tuple[str, ...]
    node: str
    low: float
    high: float


@dataclass(frozen=True)
class ChannelGroup:
    """Values whose channels are scaled as one.

    Attributes:
        count: of the channels.
        dim: that they are in.
        writers: sites of the weights of the layers that make them, each with scales by channel.
        readers: sites of the weights that are multiplied by them, each with the node that is read.
        outputs: all that is put on a scale of them.
    """

    count: int
    dim: int
    writers: tuple[str, ...]
    readers: tuple[tuple[str, str], ...]
    outputs: tuple[Output, ...]


@dataclass
class _Values:
    """Nodes whose channels are the same, the layers that make them, and those that read them, each with what it reads;
    `closed` where something else makes or reads them."""

    nodes: list[Node]
    writers: list[Node] = field(default_factory=list)
    readers: list[tuple[Node, Node]] = field(default_factory=list)
    closed: bool = False


class ChannelGroups:
    """Finds them in a lowered model.

    Args:
        idle: names of nodes that give what they read (norms that were folded).
    """

    def __init__(self, backend: Backend, idle: Collection[str] = ()) -> None:
        self._backend, self._lone, self._idle = backend, LoneSites(backend), idle
        self._values: dict[Node, _Values] = {}

    def find(self) -> list[ChannelGroup]:
        """In graph order."""
        for node in self._backend.model.graph.nodes:
            self._join(node)
        every = {id(values): values for values in self._values.values()}
        found = [self._made(values) for values in every.values() if not values.closed]
        return [group for group in found if group is not None]

    def _join(self, node: Node) -> None:
        """Put a node to the values that it is one of, and to those that it reads."""
        inputs, known = _inputs(node), of_node(node, self._lone.modules)
        own = self._values[node] = _Values([node])
        if known is not None and known.product in _LAYERS and known.after in _AFTER and not known.adds:
            own.writers.append(node)
            self._values[inputs[0]].readers.append((node, inputs[0]))
        elif self._keeps_ratios(node, known):
            for value in inputs:
                self._unite(value, node)
        else:
            own.closed = True
            for value in inputs if reads(node) else ():
                self._values[value].closed = True

    def _keeps_ratios(self, node: Node, known: Quantized | None) -> bool:
        """Whether a node gives the scaled values for scaled inputs."""
        if known is not None and known.role == "binary":
            return packet_of(node.target) in SUMS and len(_inputs(node)) > 1
        op = op_of(node, self._lone.modules)
        kept = op is not None and (op in _HOMOGENEOUS or op.effect == "averages")
        return node.name in self._idle or (kept and len(_inputs(node)) == 1)

    def _unite(self, one: Node, other: Node) -> None:
        kept, gone = self._values[one], self._values[other]
        if kept is gone:
            return
        kept.nodes += gone.nodes
        kept.writers += gone.writers
        kept.readers += gone.readers
        kept.closed |= gone.closed
        self._values.update(dict.fromkeys(gone.nodes, kept))

    def _made(self, values: _Values) -> ChannelGroup | None:
        """The group of values; None where one of their sites moves with others, or weights do not fit."""
        weights, backend = self._lone.weights, self._backend
        layers = [*values.writers, *(layer for layer, _ in values.readers)]
        if not values.writers or not values.readers or any(layer.name not in weights for layer in layers):
            return None
        writers = [weights[writer.name] for writer in values.writers]
        shapes = [backend.weight(writer.name).shape for writer in writers]
        counts, outputs = {shape[0] for shape in shapes}, self._outputs(values)
        if len(counts) > 1 or any(writer.axis != 0 for writer in writers) or outputs is None:
            return None
        (count,), dim = counts, 1 if any(len(shape) > 2 for shape in shapes) else -1
        readers = tuple((weights[layer.name].name, value.name) for layer, value in values.readers)
        if any(columns_of(count, tuple(backend.weight(name).shape)) is None for name, _ in readers):
            return None
        return ChannelGroup(count, dim, tuple(writer.name for writer in writers), readers, outputs)

    def _outputs(self, values: _Values) -> tuple[Output, ...] | None:
        """None where one does not move, or moves with what is elsewhere."""
        nodes, found = {node.name: node for node in values.nodes}, list[Output]()
        sites = [site for site in self._backend.sites.values() if site.kind == "activation"]
        groups = self._backend.sites.groups()
        for lead in {site.tied: None for site in sites if not nodes.keys().isdisjoint(site.nodes)}:
            group = groups.get(lead, ())
            if not group or not all(nodes.keys() >= set(site.nodes) for site in group):
                return None
            node = group[0].nodes[0]
            found.append(Output(tuple(site.name for site in group), node, *self._ends(nodes[node])))
        return tuple(found)

    def _ends(self, node: Node) -> tuple[float, float]:
        """Between which the readers of a value let it through."""
        ends = list[tuple[float, float]]()
        for user in filter(reads, node.users):
            op = op_of(user, self._lone.modules)
            if op in CLIPS:
                ends.append((0.0, CLIPS[op]))
            elif user.name in self._idle or op in _PASSING:
                ends.append(self._ends(user))
            else:
                return -math.inf, math.inf
        return min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0)


def _inputs(node: Node) -> list[Node]:
    """Values that a node reads, without what the model holds."""
    return [value for value in node.all_input_nodes if value.op != "get_attr"]


def columns_of(channels: int, shape: tuple[int, ...]) -> Tensor | None:
    """Which of so many channels each column of each row of a reader's weight is multiplied by.

    Args:
        shape: of the weight: (O, K) of a linear layer, which may read several columns a channel (flattened), or
            (O, channels, ...) of a convolution, (O, 1, ...) of a depthwise one.

    Returns:
        Numbers of channels, int64, (O, K); None where the weight has no room for them, or has several groups of several
        channels: their factors could not be told from codes.
    """
    rows, columns = shape[:2]
    if columns == channels or (len(shape) == 2 and columns % channels == 0):
        return (torch.arange(columns) // (columns // channels)).expand(rows, -1)
    if columns > 1 or rows % channels:
        return None
    return torch.arange(channels).repeat_interleave(rows // channels)[:, None]
