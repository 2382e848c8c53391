"""The loss of a batch on the float twin and its gradient, part by part: only the graph of one part is held at a time.

A loss that is a mean over images is followed in one pass. One that compares images with one another (InfoNCE), or that
nobody knows, takes two: all outputs without graphs, then part by part what the loss pulls at these.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.losses import Loss
from cptv_ao.core.objective import differentiable
from cptv_ao.core.tensors import Select, compared
from cptv_ao.fx.running import own_inputs
from cptv_ao.search.proposals.captured import Captured
from cptv_ao.search.proposals.device_memory import cache_bytes, graph_bytes
from cptv_ao.search.proposals.feature_matching import LayerInputTargets, Target, Targets, distance
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.layer_inputs import LayerInputs, seeing_inputs
from cptv_ao.simulation.products import tensor_cores
from cptv_ao.simulation.twin import Twin


@dataclass(frozen=True)
class Objective:
    """What a descent follows.

    Attributes:
        loss, select: as for the evaluator; a loss that cannot be differentiated is not followed.
        per_image: whether the loss is a mean over images, each on its own.
        feature_weight: what the distance of the layer inputs from those of the float network counts beside the loss, in
            losses, both as they are in the first step.
        cache_bytes: what may be kept of the layer inputs in float.
    """

    loss: Loss
    select: Select
    per_image: bool = False
    feature_weight: float = 0.0
    cache_bytes: int = 0


@dataclass(frozen=True)
class _Graph:
    """Of a part of a batch: its outputs (N, C), and its share of the distance of the layer inputs ()."""

    outputs: Tensor
    features: Tensor

    def gradient(self, leaves: Sequence[Tensor], pull: Tensor, feature_pull: float | Tensor) -> Tensor:
        """With respect to all leaves, one after another, where the loss pulls so much at outputs and features."""
        ends, pulls = [self.outputs], [pull]
        if self.features.requires_grad:
            own = torch.full_like(self.features, feature_pull) if isinstance(feature_pull, float) else feature_pull
            ends, pulls = [*ends, self.features], [*pulls, own]
        with tensor_cores(self.outputs):
            found = torch.autograd.grad(ends, leaves, pulls, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in found])


class BatchGradient:
    """Losses and gradients of batches.

    Args:
        twin: of the model, checked on some images of its batches.
        groups: whose leaves the gradient is of.
        objective: what is followed.
        world: the ranks that share the parts of a batch.
    """

    def __init__(
        self, twin: Twin, groups: Sequence[LearnableQParams], objective: Objective, world: World = ALONE
    ) -> None:
        self._twin, self._groups, self._objective, self._world = twin, groups, objective, world
        self.features = LayerInputTargets(twin, cache_bytes(twin.device, objective.cache_bytes))
        self._most = largest_part(twin)
        self._replaced = {site.name: tuple(group.values()) for group in groups for site in group.sites}
        self._captured = Captured() if twin.device.type == "cuda" else None
        self._forwards = 0
        self._differentiable: bool | None = None  # asked once, for a loss that is not known

    @property
    def image_forwards(self) -> int:
        """Images that went through the twin on this rank; forward and backward count as three."""
        return self._forwards + self.features.image_forwards

    def follows(self, images: StepImages) -> bool:
        """Whether there is anything to follow on these."""
        objective = self._objective
        return objective.per_image or objective.feature_weight > 0 or self._follows(images.at(0)[1])

    def of(
        self, index: int, batch: Batch, teacher: Tensor, leaves: Sequence[Tensor], feature_pull: float | None
    ) -> tuple[Tensor, Tensor, float]:
        """The loss () of a batch, on every rank, and its gradient.

        Gradients are summed part by part in a fixed order, so they do not depend on which rank had which part.

        Args:
            index: names the batch.
            teacher: its targets (N, C).
            leaves: with respect to these.
            feature_pull: what the distance of the layer inputs counts; None: it is balanced with the loss on this
                batch.

        Returns:
            The loss, its gradient with respect to all leaves one after another, and the feature pull.

        Raises:
            torch.cuda.OutOfMemoryError: not even the graph of one image fits into the memory of the card, or there are
                other ranks, which would have to cut their batches alike.
        """
        while True:
            try:
                return self._of(index, batch, teacher, leaves, feature_pull)
            except torch.cuda.OutOfMemoryError:
                if self._world.size > 1 or self._most == 1:
                    raise
            self._most //= 2
            self.features.forget()
            if self._captured is not None:
                self._captured.clear()

    def _of(
        self, index: int, batch: Batch, teacher: Tensor, leaves: Sequence[Tensor], feature_pull: float | None
    ) -> tuple[Tensor, Tensor, float]:
        parts, follows = self._parts(batch), self._follows(teacher)
        outputs, graphs = torch.zeros_like(teacher), dict[int, _Graph]()
        pull, loss = (None if follows else torch.zeros_like(teacher)), None
        balances = feature_pull is None and self._objective.feature_weight > 0
        captures = self._captured is not None and follows and (self._objective.per_image or len(parts) == 1)
        if balances or (not captures and (len(parts) == 1 or (follows and not self._objective.per_image))):
            apart = self._all_forward(index, batch, parts, outputs, graphs)
            loss, pull = self._pulled(self._world.sum(outputs), teacher, follows)
            if balances:
                excess = float(loss - self._objective.loss(teacher, teacher)) if follows else 1.0
                feature_pull = self._balanced(excess, apart)
        total = outputs.new_zeros(sum(leaf.numel() for leaf in leaves))
        for first in range(0, len(parts), self._world.size):
            around = range(first, min(first + self._world.size, len(parts)))  # a part of each rank
            found: dict[int, Tensor] = {}
            for number in filter(self._world.mine, around):
                part, rows = parts[number]
                if pull is None and captures:
                    own = self._part_at_once((index, number), part, teacher[rows], leaves, feature_pull or 0.0)
                    outputs[rows], found[number] = own[0], own[1] * (part.images / batch.images)
                    continue
                graph = graphs.pop(number, None) or self._forward((index, number), part, part.images / batch.images)
                outputs[rows] = graph.outputs.detach()
                pulled = self._pull_at(outputs, teacher, rows) if pull is None else pull[rows]
                found[number] = graph.gradient(leaves, pulled, feature_pull or 0.0)
                del graph
            for number in around:
                total += self._world.sum(found[number] if number in found else torch.zeros_like(total))
        if loss is None:
            loss = self._objective.loss(self._world.sum(outputs), teacher)
        return loss, total, feature_pull or 0.0

    def _all_forward(
        self,
        index: int,
        batch: Batch,
        parts: Sequence[tuple[Batch, slice]],
        outputs: Tensor,
        graphs: dict[int, _Graph],
    ) -> list[float]:
        """Fill in this rank's outputs, and return how far the features of each part are apart; the graph of a batch
        that is a single part is kept."""
        apart = [0.0] * len(parts)
        for number, (part, rows) in enumerate(parts):
            if self._world.mine(number):
                keeps = len(parts) == 1
                graph = self._forward((index, number), part, part.images / batch.images, keeps)
                outputs[rows], apart[number] = graph.outputs.detach(), float(graph.features.detach())
                if keeps:
                    graphs[number] = graph
        return apart

    def _pull_at(self, outputs: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        """What a mean over images pulls at some of them, wherever the others are."""
        alone = torch.zeros_like(outputs)
        alone[rows] = outputs[rows]
        return self._pulled(alone, teacher, True)[1][rows]

    def _pulled(self, outputs: Tensor, teacher: Tensor, follows: bool) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to the outputs; none where it has none."""
        if not follows:
            return self._objective.loss(outputs, teacher), torch.zeros_like(outputs)
        followed = outputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._objective.loss(followed, teacher)
        return loss.detach(), torch.autograd.grad(loss, followed)[0]

    def _forward(self, key: tuple[int, int], part: Batch, share: float, graph: bool = True) -> _Graph:
        """Of a part that is so much of its batch."""
        self._forwards += 3 * part.images if graph else part.images
        wanted = self.features.wanted(key, part) if self._objective.feature_weight else None
        with torch.set_grad_enabled(graph):
            found = self._graph(part, wanted)
            return _Graph(found.outputs, found.features * share)

    def _graph(self, part: Batch, wanted: Targets | None) -> _Graph:
        watching: AbstractContextManager[LayerInputs]
        watching = seeing_inputs(self._twin) if wanted else nullcontext({})
        args, kwargs = own_inputs(part)
        values = {site.name: group.values() for group in self._groups for site in group.sites}
        with watching as inputs:
            outputs = compared(self._twin.call(values, *args, **kwargs), self._objective.select)
        return _Graph(outputs, distance(inputs, wanted) if wanted else outputs.new_zeros(()))

    def _part_at_once(
        self, key: tuple[int, int], part: Batch, teacher: Tensor, leaves: Sequence[Tensor], feature_pull: float
    ) -> tuple[Tensor, ...]:
        """The outputs of a part, and the gradient of its own loss and distance, by one launch on a GPU."""
        assert self._captured is not None
        self._forwards += 3 * part.images
        wanted = self.features.wanted(key, part) if self._objective.feature_weight else {}
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
            pulled = self._pulled(graph.outputs.detach(), teacher, True)[1]
            return graph.outputs.detach(), graph.gradient(leaves, pulled, pull)

        given = [teacher, pull, *part.tensors.values(), *targets]
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in given)
        others = tuple((path, repr(value)) for path, value in part.leaves if not isinstance(value, Tensor))
        return self._captured.run(
            (self._twin.stamp(self._replaced), shapes, tuple(paths), others, tuple(map(id, wanted))), compute, given
        )

    def _balanced(self, excess: float, features: Sequence[float]) -> float:
        """What lets the features count so many times the loss, both as they are now.

        Args:
            excess: of the loss over that of the teacher's own outputs.
            features: of each part; 0 where another rank has it.
        """
        apart = float(self._world.sum(torch.tensor(features)).sum())
        return self._objective.feature_weight * abs(excess) / apart if apart > 0 else 0.0

    def _follows(self, teacher: Tensor) -> bool:
        if self._differentiable is None:
            self._differentiable = self._objective.per_image or differentiable(self._objective.loss, teacher)
        return self._differentiable

    def _parts(self, batch: Batch) -> list[tuple[Batch, slice]]:
        """The parts of a batch that may run on a rank of their own, with their rows of the output."""
        return batch.parts(-(-batch.images // self._most))


def largest_part(twin: Twin) -> int:
    """Images whose graph may be held at once."""
    return max(1, int(graph_bytes(twin.device) / max(twin.graph_bytes, 1.0)))
