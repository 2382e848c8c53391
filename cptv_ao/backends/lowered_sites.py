"""The sites of a lowered graph as they are found: what is told of each, and which move together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from cptv_ao.backends.scale_slots import ScaleSlot, ScannedGraph, WeightSlot, infer_range
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.fx.producers import producer

_DTYPE_RANGE = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}


class Place(NamedTuple):
    """Where a site was found: the node that uses its scale, and what it is called by."""

    node: Node
    name: str
    op: str
    scope: str


class LoweredSites:
    """Sites in graph order; a site that is found at several nodes is one.

    Args:
        modules: of the graph, by path.
        ranges: nominal `(qmin, qmax)` by weight site; inferred from the codes else.

    Attributes:
        sums: adds, whose scales an engine may want near each other.
        cats: nodes whose inputs move together.
    """

    def __init__(self, modules: Mapping[str, nn.Module], ranges: Mapping[str, tuple[int, int]]) -> None:
        self._modules, self._ranges = modules, ranges
        self._sites: dict[str, ScaleSite] = {}
        self._activations: dict[str, ScaleSlot] = {}
        self._weights: dict[str, WeightSlot] = {}
        self._by_node: dict[Node, str] = {}  # activation site of a node's output
        self._weighted: list[tuple[Node, str]] = []  # nodes with a weight site
        self.sums: list[Node] = []
        self.cats: list[Node] = []

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def found(self, unknown: Sequence[str], weight_only: Sequence[str]) -> ScannedGraph:
        """All of them, those tied that move together, with what is told beside."""
        for node in self.cats:
            self._tie(node)
        table = SiteTable(tuple(self._sites.values()), tuple(unknown), tuple(weight_only))
        return ScannedGraph(table, self._activations, self._weights, tuple(self._pairs()), tuple(self._remembered()))

    def add_activation(self, at: Place, slot: ScaleSlot, dtype: Any, fixed: str, channels: int | None) -> None:
        """Add the site of what a node returns.

        Args:
            fixed: why it never moves; `""`: it may.
            channels: the dimension of its channels, where it is certain.
        """
        self._by_node[at.node] = at.name
        if self._seen(at):
            return
        if dtype not in _DTYPE_RANGE:
            fixed = fixed or f"dtype {dtype} is not searched"
        qmin, qmax = _DTYPE_RANGE.get(dtype, (0, 0))
        self._activations[at.name] = slot
        self._sites[at.name] = ScaleSite(
            at.name,
            "activation",
            at.op,
            at.scope,
            (),
            None,
            qmin,
            qmax,
            not fixed,
            (at.node.name,),
            at.name,
            fixed,
            channels,
        )

    def add_weight(self, at: Place, slot: WeightSlot, fixed: str) -> str:
        """Add the site of what a node multiplies by, or say why there is none."""
        if self._seen(at):
            self._weighted.append((at.node, at.name))
            return ""
        try:
            weight = slot.weight()
        except RuntimeError:  # QNNPACK, of what it packs for three dimensions: no state_dict either
            return f"which {torch.backends.quantized.engine} does not give back"
        if not weight.is_quantized:  # float16, of dynamic linears
            return "in float"
        shape: tuple[int, ...]
        axis: int | None
        if weight.dtype != torch.qint8:
            fixed = fixed or f"weights of dtype {weight.dtype} are not searched"
            shape, axis, qmin, qmax = (), None, 0, 0
        else:
            per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            axis = weight.q_per_channel_axis() if per_channel else None
            shape = (weight.shape[axis],) if axis is not None else ()
            qmin, qmax = self._ranges.get(at.name) or infer_range(weight)
        self._weighted.append((at.node, at.name))
        self._weights[at.name] = slot
        self._sites[at.name] = ScaleSite(
            at.name, "weight", at.op, at.scope, shape, axis, qmin, qmax, False, (at.node.name,), at.name, fixed
        )
        return ""

    def _seen(self, at: Place) -> bool:
        """Whether the site was found at another node before; this one is added to it."""
        before = self._sites.get(at.name)
        if before is not None:
            self._sites[at.name] = replace(before, nodes=(*before.nodes, at.node.name))
        return before is not None

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """The output of each sum and each of its inputs."""
        for node in self.sums:
            for given in node.args[:2]:
                source = self._producer(given)
                if source in self._by_node and node in self._by_node:
                    yield self._by_node[node], self._by_node[source]

    def _remembered(self) -> Iterator[tuple[str, str]]:
        """The output of each packed weight's op, and the input of each convolution that pads."""
        for node, name in self._weighted:
            if node in self._by_node:
                yield self._by_node[node], name
            source = self._producer(node.args[0]) if self._weights[name].pads else None
            if source in self._by_node:
                yield self._by_node[source], name

    def _producer(self, given: Any) -> Any:
        """The node whose site a value is of; None of what is no node's."""
        return producer(given, self._by_node, self._modules) if isinstance(given, Node) else None

    def _tie(self, cat: Node) -> None:
        """Tie the producers of the inputs of a cat, where they share their qparams now.

        Before: q1 -> relu --> cat      After: q1.tied == q2.tied
                q2 ---------->/
        """
        inputs = cat.args[0] if cat.args else cat.kwargs["tensors"]
        if not isinstance(inputs, (list, tuple)):
            return
        names = [self._by_node.get(self._producer(given)) for given in inputs if isinstance(given, Node)]
        sites = [self._sites[name] for name in names if name is not None]
        if len(sites) < 2:
            return
        lead = sites[0]
        first = self._activations[lead.name].read()
        for site in sites[1:]:
            own = self._activations[site.name].read()
            if own.scale == first.scale and own.zero_point == first.zero_point:
                self._join(site.tied, lead.tied)
                lead = self._sites[lead.name]

    def _join(self, tied: str, into: str) -> None:
        if tied == into:
            return
        # The first in graph order leads, so that a group's name does not depend on the order of its cats.
        order = list(self._sites)
        lead, other = sorted((tied, into), key=order.index)
        for name, site in self._sites.items():
            if site.tied == other:
                self._sites[name] = replace(site, tied=lead)
