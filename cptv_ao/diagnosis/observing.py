"""Which ops are observed, by themselves or for what reads them: what stock torch quantizes around an op."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.diagnosis.value_flow import ValueFlow
from cptv_ao.fx.decomposed_ops import packet_of
from cptv_ao.fx.ops import op_of
from cptv_ao.transforms.float_model.exclusion import quantizable_kinds

# Ops beside those with a weight that quantizers of PT2E annotate: they read quantized values, and write them.
_SHARING = {"cat", "max_pool", "avg_pool", "adaptive_avg_pool", "mean"}  # what they return is on the scale of the input
_ANNOTATED = {"add", "mul", "matmul", *_SHARING}


class Observing:
    """Of one quantized graph.

    Args:
        backend: of the model.
        flow: who makes and reads its values.
    """

    def __init__(self, backend: Backend, flow: ValueFlow) -> None:
        self._flow, self._nodes = flow, flow.nodes
        self._of_sites = {name for site in backend.sites.values() for name in site.nodes}
        self._weighted = {n for site in backend.sites.values() if site.kind == "weight" for n in site.nodes}

    def makes_float(self, name: str) -> bool:
        """Whether nobody observes what a node returns on its own account."""
        node = self._nodes[name]
        if not node.op.startswith("call_"):
            return True
        return not (self._annotates_output(node) if self._flow.exported else self._quantizable(node))

    def reads_float(self, node: Node) -> bool:
        """Whether a node takes floats as they are."""
        return not (self._annotated(node) if self._flow.exported else self._quantizable(node))

    def _quantizable(self, node: Node) -> bool:
        """Whether torch.ao knows the op as one that it quantizes; what is lowered it does."""
        if node.name in self._of_sites:
            return True
        module = self._flow.modules.get(str(node.target)) if node.op == "call_module" else None
        return (node.target if module is None else type(module)) in self._kinds

    @cached_property
    def _kinds(self) -> set[Any]:
        return set(quantizable_kinds())

    def _annotates_output(self, node: Node) -> bool:
        """Whether a quantizer of PT2E observes what a node returns."""
        node = self._behind_moves(node)
        return self._annotated(node) and (self._outputs_annotated or self._kind(node) in _SHARING)

    def _behind_moves(self, node: Node) -> Node:
        while self._flow.effect(node) in {"moves", "clamps"} and node.args and isinstance(node.args[0], Node):
            node = node.args[0]
        return node

    @cached_property
    def _outputs_annotated(self) -> bool:
        """X86InductorQuantizer observes what ops are given, XNNPACKQuantizer also what they return: then there is an op
        whose output is quantized though nothing that reads it asks for that."""
        for made, read in self._flow.sites.values():
            makers = [self._behind_moves(self._nodes[name]) for name in made]
            asked = any(self._annotated(self._nodes[name]) for name in read)
            own = any(self._annotated(maker) and self._kind(maker) not in _SHARING for maker in makers)
            if own and not asked:
                return True
        return False

    def _annotated(self, node: Node) -> bool:
        """Whether a quantizer of PT2E observes what a node is given."""
        return node.name in self._weighted or self._kind(node) in _ANNOTATED

    def _kind(self, node: Node) -> str:
        op, packet = op_of(node, self._flow.modules), packet_of(node.target)
        if op is not None:
            return op.name
        return "" if packet is None else packet.__name__.rstrip("_")
