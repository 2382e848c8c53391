"""Who makes and who reads each quantized value of a graph, and what becomes float with a part of the network."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.diagnosis.graph_parts import GraphParts
from cptv_ao.diagnosis.observing import Observing
from cptv_ao.diagnosis.value_flow import ValueFlow
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.partly_float import FloatRegion
from cptv_ao.transforms.float_model.exclusion import Part


class _Needs(NamedTuple):
    """What must be float before a site is not rounded on any more: all that observe what they make, or are given.

    `touched`: those, and the others that make or read its values.
    """

    touched: frozenset[str]
    makers: frozenset[str]
    readers: frozenset[str]


class Wiring:
    """Of one quantized graph.

    A value stays float where both its maker and its reader do: torch.ao observes what a quantized op returns, and what
    one is given.

    Args:
        backend: of the model; nothing is written.
        float_model: where modules are found that lowering made a part of another op.

    Attributes:
        flow: who makes and reads its values.
        parts: what can be left in float.
    """

    def __init__(self, backend: Backend, float_model: nn.Module | None = None) -> None:
        self._backend, self.flow = backend, ValueFlow(backend)
        self._nodes = self.flow.nodes
        self.parts = GraphParts(backend, self.flow, float_model)

    def groups(self) -> list[frozenset[Part]]:
        """Sets of parts that are worth leaving in float together: each part, but for those that only hand values on;
        all that makes and reads the values of a site; modules with all that is in them."""
        of_node = self.parts.of_node
        alone = (parts for name, parts in of_node.items() if not self.flow.hands_on(name))
        found: dict[frozenset[Part], None] = dict.fromkeys(alone)
        for made, read in self.flow.sites.values():
            names = [name for name in (*made, *self.flow.onward(read)) if self._nodes[name].op.startswith("call_")]
            if names and all(name in of_node for name in names):
                found[frozenset(part for name in names for part in of_node[name])] = None
        found |= dict.fromkeys(frozenset([Part(path)]) for path in sorted(self.parts.outer))
        return list(found)

    def region(self, nodes: Collection[str]) -> FloatRegion:
        """What becomes float with these nodes."""
        own = set(nodes)
        off = [name for name, needs in self._needs.items() if needs.touched & own and needs.makers <= own]
        floating = {*own, *(node for name in off for node in self._backend.sites[name].nodes)}
        entries = {
            user.name
            for name in floating
            for user in self._nodes[name].users
            if user.name not in own and self._rounds(user, own)
        }
        return FloatRegion(frozenset(off), self._weights_in(own), frozenset(entries))

    def vanishing(self, nodes: Collection[str]) -> frozenset[str]:
        """The sites that nothing is rounded on any more when these nodes are float."""
        own = set(nodes)
        needs = self._needs.items()
        off = {name for name, n in needs if n.touched & own and n.makers <= own and n.readers <= own}
        return self._weights_in(own) | off

    def _weights_in(self, nodes: set[str]) -> frozenset[str]:
        """Sites of the weights, known in float, that these nodes alone compute with."""
        sites, known = self._backend.sites.values(), self._backend.float_weights
        return frozenset(
            one.name for one in sites if one.kind == "weight" and one.name in known and nodes >= {*one.nodes}
        )

    @cached_property
    def _needs(self) -> dict[str, _Needs]:
        return {
            name: _Needs(
                made | read,
                frozenset(maker for maker in made if not self._observing.makes_float(maker)),
                frozenset(reader for reader in read if not self._observing.reads_float(self._nodes[reader])),
            )
            for name, (made, read) in self.flow.sites.items()
        }

    def operations(self, batch: Batch) -> dict[str, float]:
        """What each quantized node computes for an image: multiply-accumulates of a layer, one per value of another
        op."""
        images, found = batch.few(1), dict[str, float]()
        owned = {name for site in self.flow.activations for name in site.nodes}
        weight = {n: s.name for s in self._backend.sites.values() if s.kind == "weight" for n in s.nodes}

        def see(node: Node, value: object) -> object:
            if isinstance(value, Tensor) and node.name in self.parts.scopes and node.name in {*owned, *weight}:
                each = 1.0
                if node.name in weight and (held := self._backend.weight(weight[node.name])).dim() > 1:
                    each = held.numel() / held.shape[0]
                found[node.name] = each * value.numel() / images.images
            return value

        Watcher(self._backend.model).watch(images, see)
        return found

    @cached_property
    def _observing(self) -> Observing:
        return Observing(self._backend, self.flow)

    def _rounds(self, node: Node, nodes: Collection[str]) -> bool:
        """Whether a node that is not float itself puts what it is given on a scale."""
        effect = self.flow.effect(node)
        if effect == "dequantizes":
            readers = self.flow.readers(node)
            return not all(r.name in nodes or self._observing.reads_float(r) for r in readers)
        return effect != "quantizes" and node.op.startswith("call_")
