"""Residual streams of a model: values of one width that layers write into, sums carry on, and norms read.

x = patches(image) + position        written by a layer and by a tensor of the model, or begun by a norm of them
x = x + proj(attention(norm(x)))     a sum; read by a norm, and by the linear layers behind it
return head(norm(x))

Those of float models are found by `cptv_ao.transforms.float_model.float_streams`, those of lowered ones by
`cptv_ao.transforms.lowered_streams`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from torch.fx import Graph, Node

from cptv_ao.fx.readers import reads

#: Names of the weight of a norm and of its bias, None where it has none.
Norm = tuple[str, str | None]

# A norm that begins a stream needs a layer more, which is worth it where the stream has so many sums.
_SUMS_OF_A_START = 4


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution.

    Attributes:
        weight: its name: the path of a tensor, or a site.
        bias: path of its own, which need not be there; None of one that is packed with the weight, or has no room.
        shape: of the weight, (O, K, ...).
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        """Whether it reads the last dimension."""
        return len(self.shape) == 2


@dataclass(frozen=True)
class Writer:
    """A layer that writes into a stream; `factors`: path of what its O channels are multiplied by then (LayerScale)."""

    layer: Layer
    factors: str | None = None


@dataclass(frozen=True)
class Reader:
    """What reads a stream.

    Attributes:
        norm: that does; None where linear layers do.
        layers: the linear layers that read it, or the norm, as nothing else does; none where the model returns it.
        end: where there are none: where a layer that rotates back has its place.
    """

    norm: Norm | None
    layers: tuple[Layer, ...]
    end: str


@dataclass(frozen=True)
class ResidualStream:
    """Values (..., width), each a sum of what `writers` and `tensors` (..., width) give.

    Attributes:
        tensors: paths.
        sums: nodes of the graph that give sums.
        nodes: all that give channels of the stream, or of the norms that read it.
        starts: places of norms that it begins with, where a layer behind each can rotate it.
    """

    width: int
    writers: tuple[Writer, ...]
    tensors: tuple[str, ...]
    readers: tuple[Reader, ...]
    sums: tuple[Node, ...]
    nodes: tuple[Node, ...]
    starts: tuple[str, ...] = ()


@dataclass
class Values:
    """Nodes that give the same channels, what makes these, and what reads them; `closed` where something else does."""

    nodes: list[Node]
    writers: list[Writer] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    sums: list[Node] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    returned: list[Node] = field(default_factory=list)
    closed: bool = False

    def take(self, other: Values) -> None:
        """Be those of another, too."""
        for name, value in vars(self).items():
            own, more = value, getattr(other, name)
            setattr(self, name, own or more if isinstance(own, bool) else own + more)


class StreamFinder(ABC):
    """Finds them in a graph.

    Args:
        graph: as traced from a float model, or of a lowered one.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._values: dict[Node, Values] = {}

    def find(self) -> list[ResidualStream]:
        """In graph order."""
        for node in self._graph.nodes:
            self._join(node)
        every = {id(values): values for values in self._values.values()}
        found = [self._made(values) for values in every.values()]
        return [stream for stream in found if stream is not None]

    @abstractmethod
    def _layer(self, node: Node) -> Layer | None:
        """The layer that a node is, with tensors that nothing else has."""

    @abstractmethod
    def _norm(self, node: Node) -> Norm | None:
        """The norm over the last dimension that a node is, with tensors that nothing else has."""

    @abstractmethod
    def _tensor(self, node: Node) -> str | None:
        """The tensor of the model that a node is, or has its rows from, and nothing else has."""

    @abstractmethod
    def _factors(self, node: Node) -> Iterator[tuple[Node, str]]:
        """Values that a node multiplies, each by a tensor of the model that nothing else has."""

    @abstractmethod
    def _carried(self, node: Node) -> list[Node] | None:
        """The values that a node gives, or sums or means of; None of one that computes something else."""

    @abstractmethod
    def _is_sum(self, node: Node) -> bool:
        """Whether a node gives a sum of two values."""

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the model."""

    @abstractmethod
    def _end(self, norm: Node, values: Values, width: int) -> str | None:
        """Where a layer behind a norm, whose values are returned, has its place; None where it has none."""

    @abstractmethod
    def _start(self, norm: Node, width: int) -> str | None:
        """Where a layer behind a norm, whose values begin a stream, has its place; None where it has none."""

    def _join(self, node: Node) -> None:
        """Put a node to the values that it is one of, and to those that it reads."""
        own, inputs = Values([node]), node.all_input_nodes
        self._values[node] = own
        layer, tensor = self._layer(node), self._tensor(node)
        if layer is not None:
            own.writers.append(Writer(layer))
            source = self._values[inputs[0]]
            source.layers.append(layer)
            source.closed |= not layer.is_linear
        elif self._norm(node) is not None:
            own.norms.append(node)
            self._values[inputs[0]].readers.append(node)
        elif tensor is not None:
            own.tensors.append(tensor)
        elif (scaled := self._scaled(node)) is not None:
            own.writers.append(scaled)
        elif (carried := self._carried(node)) is not None:
            own.sums += [node] if self._is_sum(node) else []
            for value in carried:
                self._unite(value, node)
        elif node.op == "output":
            for value in inputs:
                self._values[value].returned.append(value)
        elif reads(node):
            for value in (node, *inputs):
                self._values[value].closed = True

    def _scaled(self, node: Node) -> Writer | None:
        """The layer and the tensor of the model whose product a node is, where nothing else reads the layer."""
        for value, held in self._factors(node):
            made = self._values[value]
            if len(made.writers) != 1 or made.writers[0].factors is not None or made.closed:
                continue
            layer = made.writers[0].layer
            alone = not (made.tensors or made.norms or made.sums or made.layers or made.readers or made.returned)
            if alone and layer.is_linear and prod(self._shape(held)) == self._shape(held)[-1] == layer.shape[0]:
                made.closed = True
                self._values[node].nodes += made.nodes
                return Writer(layer, held)
        return None

    def _unite(self, one: Node, other: Node) -> None:
        kept, gone = self._values[one], self._values[other]
        if kept is not gone:
            kept.take(gone)
            self._values.update(dict.fromkeys(gone.nodes, kept))

    def _made(self, values: Values) -> ResidualStream | None:
        """The stream that values are; None where they are none, or something else writes or reads them."""
        if values.closed or values.returned or not (values.sums and values.readers and values.writers):
            return None
        width = values.writers[0].layer.shape[0]
        starts = tuple(start for node in values.norms if (start := self._start(node, width)) is not None)
        if len(starts) < len(values.norms) or len(values.sums) < _SUMS_OF_A_START * len(starts):
            return None
        readers = [self._reader(node, width) for node in values.readers]
        if values.layers:
            readers.append(Reader(None, tuple(values.layers), ""))
        fits = all(writer.layer.shape[0] == width for writer in values.writers)
        fits &= all(self._shape(tensor)[-1:] == (width,) for tensor in values.tensors)
        fits &= all(layer.shape[1] == width for layer in values.layers)
        known = tuple(reader for reader in readers if reader is not None)
        if not fits or len(known) < len(readers):
            return None
        nodes = [*values.nodes, *(node for norm in values.readers for node in self._values[norm].nodes)]
        return ResidualStream(
            width, tuple(values.writers), tuple(values.tensors), known, tuple(values.sums), tuple(nodes), starts
        )

    def _reader(self, node: Node, width: int) -> Reader | None:
        """A norm, and what reads it; None where that is something else than linear layers."""
        values, norm = self._values[node], self._norm(node)
        others = values.writers or values.tensors or values.sums or values.readers or len(values.norms) > 1
        if norm is None or self._shape(norm[0]) != (width,) or values.closed or others:
            return None
        if not values.returned:
            fits = all(layer.shape[1] == width for layer in values.layers)
            return Reader(norm, tuple(values.layers), "") if values.layers and fits else None
        end = self._end(node, values, width)
        return None if values.layers or end is None else Reader(norm, (), end)
