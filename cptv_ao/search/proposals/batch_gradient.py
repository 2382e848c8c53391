"""The loss of a batch on the float twin and its gradient, part by part: only the graph of one part is held at a time.

A loss that is a mean over images is followed in one pass. One that compares images with one another (InfoNCE), or that
nobody knows, takes two: all outputs without graphs, then part by part what the loss pulls at these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.objective import differentiable
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.device_memory import cache_bytes, graph_bytes
from cptv_ao.search.proposals.feature_matching import LayerInputTargets
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.part_runner import PartGraph, PartRunner
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.twin import Twin

# Codes of an activation beside whose steps the 8 bits of bfloat16 are many.
_COARSE = 64
# How far outputs in float that are the same may be apart, in squares beside their own; and in bfloat16, where codes are
# few.
_SAME, _SAME_COARSE = 1e-6, 1e-3


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
        self._objective, self._world = objective, world
        self._coarse = _is_coarse(twin)
        self.features = LayerInputTargets(twin, cache_bytes(twin.device, objective.cache_bytes), self._coarse)
        self._runner = PartRunner(twin, groups, objective, self.features, self._coarse)
        self._most = largest_part(twin)
        self._differentiable: bool | None = None  # asked once, for a loss that is not known
        self._total: Tensor | None = None

    @property
    def image_forwards(self) -> int:
        """Images that went through the twin on this rank; forward and backward count as three."""
        return self._runner.image_forwards + self.features.image_forwards

    def begin(self, images: StepImages) -> bool:
        """Follow these from now on; whether there is anything to follow on them.

        Where the network in float, whose layer inputs are wanted anyway, gives what the teacher does, it gives the
        targets that are still to be asked for, too.
        """
        objective = self._objective
        self.features.images = sum(batch.images for batch in images.batches)
        if objective.feature_weight and self._world.size == 1 and self._runner.captured is None and images.asks:
            teach = partial(self.features.outputs, objective.select)
            batch, target = images.at(0)
            most = _SAME_COARSE if self._coarse else _SAME
            if len(self._parts(batch)) == 1 and _apart(teach(batch), target) <= most:
                images.ask(teach)
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
            The loss; its gradient with respect to all leaves one after another, which holds until the next call; and
            the feature pull.

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
            self._runner.forget()

    def _of(
        self, index: int, batch: Batch, teacher: Tensor, leaves: Sequence[Tensor], feature_pull: float | None
    ) -> tuple[Tensor, Tensor, float]:
        parts, follows = self._parts(batch), self._follows(teacher)
        outputs, graphs = torch.zeros_like(teacher), dict[int, PartGraph]()
        pull, loss = (None if follows else torch.zeros_like(teacher)), None
        balances = feature_pull is None and self._objective.feature_weight > 0
        captures = self._runner.captured is not None and follows and (self._objective.per_image or len(parts) == 1)
        if balances or (not captures and (len(parts) == 1 or (follows and not self._objective.per_image))):
            apart = self._all_forward(index, batch, parts, outputs, graphs)
            whole = self._world.sum(outputs)
            if follows:
                loss, pull = self._objective.pull(whole, teacher)
            else:
                loss = self._objective.loss(whole, teacher)
            if balances:
                excess = float(loss - self._objective.loss(teacher, teacher)) if follows else 1.0
                feature_pull = self._balanced(excess, apart)
        total, counts = self._zero(leaves), feature_pull or 0.0
        for first in range(0, len(parts), self._world.size):
            around = range(first, min(first + self._world.size, len(parts)))  # a part of each rank
            mine = next(filter(self._world.mine, around), None)
            own = total if self._world.size == 1 else torch.zeros_like(total)
            if mine is not None:
                part, rows = parts[mine]
                share = part.images / batch.images
                if pull is None and captures:
                    outputs[rows], pulls = self._runner.at_once((index, mine), part, teacher[rows], leaves, counts)
                    own.add_(pulls * share)
                else:
                    graph = graphs.pop(mine, None) or self._runner.forward((index, mine), part, share)
                    outputs[rows] = graph.outputs.detach()
                    pulled = self._objective.pull_at(rows, outputs, teacher) if pull is None else pull[rows]
                    graph.add_gradient(leaves, pulled, counts, own)
                    del graph
            for number in around if self._world.size > 1 else ():
                total.add_(self._world.sum(own if number == mine else torch.zeros_like(total)))
        if loss is None:
            loss = self._objective.loss(self._world.sum(outputs), teacher)
        return loss, total, counts

    def _zero(self, leaves: Sequence[Tensor]) -> Tensor:
        """What gradients are added to: always the same, for what those of a large network take is dear to ask for."""
        if self._total is None:
            self._total = leaves[0].new_empty(sum(leaf.numel() for leaf in leaves), requires_grad=False)
        return self._total.zero_()

    def _all_forward(
        self,
        index: int,
        batch: Batch,
        parts: Sequence[tuple[Batch, slice]],
        outputs: Tensor,
        graphs: dict[int, PartGraph],
    ) -> list[float]:
        """Fill in this rank's outputs, and return how far the features of each part are apart; the graph of a batch
        that is a single part is kept."""
        apart = [0.0] * len(parts)
        for number, (part, rows) in enumerate(parts):
            if self._world.mine(number):
                keeps = len(parts) == 1
                graph = self._runner.forward((index, number), part, part.images / batch.images, keeps)
                outputs[rows], apart[number] = graph.outputs.detach(), float(graph.features.detach())
                if keeps:
                    graphs[number] = graph
        return apart

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


def _is_coarse(twin: Twin) -> bool:
    """Whether all activations of a network on a CPU have so few codes that what bfloat16 rounds is little beside it."""
    sites = [module.site for module in twin.sites.modules.values() if module.site.kind == "activation"]
    return twin.device.type == "cpu" and bool(sites) and all(site.qmax - site.qmin < _COARSE for site in sites)


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The squares of how far outputs are from those wanted, beside the squares of these."""
    if found.shape != wanted.shape:
        return math.inf
    return float((found - wanted).double().square().sum() / wanted.double().square().sum().clamp_min(1e-30))


def largest_part(twin: Twin) -> int:
    """Images whose graph may be held at once."""
    return max(1, int(graph_bytes(twin.device) / max(twin.graph_bytes, 1.0)))
