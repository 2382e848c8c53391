"""Parts of a batch on the float twin, forward and backward: the graph of one, or all of it in one launch of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.precision import cpu_products_in_bfloat16
from cptv_ao.core.tensors import compared
from cptv_ao.fx.running import own_inputs
from cptv_ao.search.proposals.captured import Captured
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.feature_matching import LayerInputTargets, Target, Targets, distance
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.simulation.layer_inputs import LayerInputs, seeing_inputs
from cptv_ao.simulation.products import tensor_cores
from cptv_ao.simulation.twin import Twin


@dataclass(frozen=True)
class PartGraph:
    """Of a part of a batch: its outputs (N, C), and its share of the distance of the layer inputs ()."""

    outputs: Tensor
    features: Tensor

    def gradient(self, leaves: Sequence[Tensor], pull: Tensor, feature_pull: Tensor) -> Tensor:
        """With respect to all leaves, one after another, where the loss pulls so much at outputs and features."""
        ends, pulls = self._pulled(pull, feature_pull)
        if not ends:
            return leaves[0].new_zeros(sum(leaf.numel() for leaf in leaves), requires_grad=False)
        with tensor_cores(self.outputs):
            found = torch.autograd.grad(ends, leaves, pulls, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in found])

    def add_gradient(self, leaves: Sequence[Tensor], pull: Tensor, feature_pull: float, to: Tensor) -> None:
        """Add it to a sum of such, layer by layer: that of a large network is not held twice."""
        ends, pulls = self._pulled(pull, torch.full_like(self.features, feature_pull))
        for leaf, own in zip(leaves, torch.split(to, [leaf.numel() for leaf in leaves]), strict=True):
            leaf.grad = own.view(leaf.shape)
        if ends:
            with tensor_cores(self.outputs):
                torch.autograd.backward(ends, pulls, inputs=leaves)

    def _pulled(self, pull: Tensor, feature_pull: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where a gradient begins, and with what; an op on the way may let none pass."""
        both = ((self.outputs, pull), (self.features, feature_pull))
        pulled = [(end, by) for end, by in both if end.requires_grad]
        return [end for end, _ in pulled], [by for _, by in pulled]


class PartRunner:
    """Runs the twin on parts of batches, at the scales that the leaves stand for.

    Args:
        twin: of the model, checked on some images of the batches.
        groups: what is learnt of it.
        objective: what is followed.
        targets: what the layers are given in float.
        coarse: whether bfloat16 is exact enough on a CPU.
    """

    def __init__(
        self,
        twin: Twin,
        groups: Sequence[LearnableQParams],
        objective: Objective,
        targets: LayerInputTargets,
        coarse: bool = False,
    ) -> None:
        self._twin, self._groups, self._objective, self._targets = twin, groups, objective, targets
        self._replaced = {site.name: tuple(group.values()) for group in groups for site in group.sites}
        self._products = cpu_products_in_bfloat16 if coarse else nullcontext
        #: what a GPU launches at once; None where there is none
        self.captured = Captured() if twin.device.type == "cuda" else None
        #: images that went through it on this rank; forward and backward count as three
        self.image_forwards = 0

    def forget(self) -> None:
        """Keep nothing of the parts so far: batches are cut in another way from now on."""
        self._targets.forget()
        if self.captured is not None:
            self.captured.clear()

    def forward(self, key: tuple[int, int], part: Batch, share: float, graph: bool = True) -> PartGraph:
        """Of a part that is so much of its batch.

        Args:
            key: names the part.
            graph: whether there is a gradient to be had of it.
        """
        self.image_forwards += 3 * part.images if graph else part.images
        wanted = self._targets.wanted(key, part) if self._objective.feature_weight else None
        with torch.set_grad_enabled(graph), self._products():
            found = self._graph(part, wanted)
            return PartGraph(found.outputs, found.features * share)

    def at_once(
        self, key: tuple[int, int], part: Batch, teacher: Tensor, leaves: Sequence[Tensor], feature_pull: float
    ) -> tuple[Tensor, ...]:
        """The outputs of a part, and the gradient of its own loss and distance, by one launch on a GPU."""
        assert self.captured is not None
        self.image_forwards += 3 * part.images
        wanted = self._targets.wanted(key, part) if self._objective.feature_weight else {}
        paths = list(part.tensors)
        pull = torch.full((), feature_pull, device=teacher.device)
        targets = [field for target in wanted.values() for field in (target.codes, target.scale, target.weight)]

        def compute(held: Sequence[Tensor]) -> tuple[Tensor, ...]:
            teacher, pull, *rest = held
            own = dict(zip(paths, rest, strict=False))
            fields = iter(rest[len(paths) :])
            again = {
                layer: Target(*triple) for layer, triple in zip(wanted, zip(*3 * [fields], strict=True), strict=True)
            }
            with torch.enable_grad():
                graph = self._graph(part.holding(own), again)
            pulled = self._objective.pull(graph.outputs, teacher)[1]
            return graph.outputs.detach(), graph.gradient(leaves, pulled, pull)

        given = [teacher, pull, *part.tensors.values(), *targets]
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        others = tuple((path, repr(value)) for path, value in part.leaves if not isinstance(value, Tensor))
        return self.captured.run(
            (self._twin.stamp(self._replaced), shapes, tuple(paths), others, tuple(map(id, wanted))), compute, given
        )

    def _graph(self, part: Batch, wanted: Targets | None) -> PartGraph:
        watching: AbstractContextManager[LayerInputs]
        watching = seeing_inputs(self._twin) if wanted else nullcontext({})
        args, kwargs = own_inputs(part)
        values = {site.name: group.values() for group in self._groups for site in group.sites}
        with watching as inputs, self._twin.attention():
            outputs = compared(self._twin.call(values, *args, **kwargs), self._objective.select)
        return PartGraph(outputs, distance(inputs, wanted) if wanted else outputs.new_zeros(()))
