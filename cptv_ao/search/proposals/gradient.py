"""Scales proposed by gradient descent on the float twin: Adam on log scales, straight through the rounding, and on
which way each weight is rounded.

The twin cannot see what only the kernels do (saturation), so what comes from here is a proposal: the loop accepts
it where the kernels confirm it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.losses import Loss
from cptv_ao.core.objective import differentiable
from cptv_ao.core.plain import from_plain
from cptv_ao.core.qparams import Assignment, QParams, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.tensors import Select, compared
from cptv_ao.fx.running import own_inputs
from cptv_ao.search.proposals.feature_matching import LayerInputTargets, distance
from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.schedule import DescentProgress, Schedule
from cptv_ao.simulation.twin import LayerInputs, Twin

# Numbers of the input from which a part is worth a forward of its own (7 images of 224 x 224): what the parts are
# depends on the batch alone, never on how many ranks there are.
_PART_NUMBERS = 2**20
# Share of the learning rate that is left after the descent was sent back.
_BACK_OFF = 0.5


#: Of a descent: its tensors, and what JSON can hold.
State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class _Graph:
    """Of a part of a batch: its outputs (N, C), and its share of the distance of the layer inputs ()."""

    outputs: Tensor
    features: Tensor

    def gradient(self, leaves: Sequence[Tensor], pull: Tensor, feature_pull: float) -> Tensor:
        """With respect to all leaves, one after another, where the loss pulls so much at outputs and features."""
        ends, pulls = [self.outputs], [pull]
        if self.features.requires_grad:
            ends, pulls = [*ends, self.features], [*pulls, torch.full_like(self.features, feature_pull)]
        found = torch.autograd.grad(ends, leaves, pulls, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in found])


class GradientDescent:
    """Adam on the scales and zero_points of the twin.

    Args:
        twin: the twin of the model with the scales to start from.
        groups: the tied groups that are searched, by the name of their leader.
        loss, select: as for the evaluator; a loss that cannot be differentiated is not followed.
        activation_rate: multiple of the learning rate at which activations move; weights move at the rate itself,
            those of many codes slower.
        rounding_rate: multiple of the learning rate at which the shifts of the weights move; 0: weights are rounded as
            they are.
        feature_weight: what the distance of the layer inputs from those of the float network counts beside the loss, in
            losses, both as they are in the first step.
        cache_bytes: what may be kept of the layer inputs in float.
        rng: draws the order of the batches.
        world: the ranks that share the images of a step.
    """

    def __init__(
        self,
        twin: Twin,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        loss: Loss,
        select: Select,
        *,
        activation_rate: float = 1.0,
        rounding_rate: float = 0.0,
        feature_weight: float = 0.0,
        cache_bytes: int = 0,
        rng: np.random.Generator,
        world: World = ALONE,
    ) -> None:
        known = set(twin.names)
        twin.reround_weights()
        self._twin, self._loss, self._select, self._rng, self._world = twin, loss, select, rng, world
        self._feature_weight, self._features = feature_weight, LayerInputTargets(twin, cache_bytes)
        shifts = rounding_rate > 0
        self._groups = [
            LearnableQParams.of(twin, g, shifts) for g in groups.values() if all(site.name in known for site in g)
        ]
        rates = self._parameters(activation_rate, rounding_rate)
        self._adam = torch.optim.Adam(rates, lr=1.0, betas=(0.9, 0.95), fused=True)
        self._course = DescentProgress()
        self._images = 0
        self._follows = True  # the loss, beside the layer inputs

    @property
    def image_forwards(self) -> int:
        """Images that went through the twin on this rank; forward and backward count as three."""
        return 3 * self._images + self._features.image_forwards

    def go_back_to(self, scales: Callable[[str], QParams]) -> None:
        """Go on from other scales (by site name), at half the learning rate."""
        with torch.no_grad():
            for group in self._groups:
                group.set(scales(group.sites[0].name))
        for state in self._adam.state.values():
            state["exp_avg"].zero_()  # where it was heading; how large gradients are still holds
        self._course.caution *= _BACK_OFF

    def rescale(self, factors: Mapping[str, float]) -> None:
        """Multiply the scales of groups, by the name of their leader; the lower ends of their ranges stay."""
        for group in self._groups:
            if (factor := factors.get(group.sites[0].tied)) is not None:
                site = group.sites[0]
                group.set(rescaled(group.qparams(site, self._twin.get(site.name)), factor, site))

    def run(
        self,
        batches: Sequence[Batch],
        teacher: Sequence[Tensor],
        schedule: Schedule,
        on_step: Callable[[float], None] | None = None,
        going: Callable[[], bool] = lambda: True,
        on_pause: Callable[[bool], None] | None = None,
    ) -> Iterator[tuple[str, Callable[[], Assignment]]]:
        """Descend; yield what is to be tried on the kernels, with its name, `schedule.proposals` times, and at the end.

        `on_step` is given the loss of each step's batch; `going` is asked before each step whether to go on, and
        `on_pause` called, when `state` says all that there is: with True at the start, behind what was yielded, and
        where it does not go on.
        """
        course = self._course
        self._follows = differentiable(self._loss, teacher[0])
        if not (self._follows or self._feature_weight):
            return
        while (progress := schedule.progress(course.steps)) < 1.0:
            goes_on = going()
            if on_pause is not None:
                on_pause(course.steps == course.proposed_at or not goes_on)
            if not goes_on:
                break
            if not course.order:
                course.order = [int(i) for i in self._rng.permutation(len(batches))]
            index = course.order.pop()
            for group in self._adam.param_groups:
                group["lr"] = schedule.rate(progress) * group["factor"] * course.caution
            loss = self._step(index, batches[index], teacher[index])
            if on_step is not None:
                on_step(loss)
            if schedule.progress(course.steps) >= (course.proposals + 1) / schedule.proposals:
                yield course.proposed(), self.assignment
        else:
            course.over = True
        if course.steps > course.proposed_at:  # the seconds were over before
            yield course.proposed(), self.assignment

    @property
    def steps(self) -> int:
        """So far."""
        return self._course.steps

    @property
    def over(self) -> bool:
        """Whether the schedule has come to its end, and nothing has stopped it before."""
        return self._course.over

    def state(self) -> State:
        """Where the descent is between two steps, for `set_state`."""
        tensors = {f"steps/{name}": values["scale"] for name, values in self._features.steps.items()}
        for index, leaf in enumerate(self._leaves):
            tensors[f"leaf/{index}"] = leaf.detach()
            tensors |= {f"adam/{index}/{name}": value for name, value in self._adam.state.get(leaf, {}).items()}
        return tensors, {"course": asdict(self._course), "random": self._rng.bit_generator.state}

    def set_state(self, state: State) -> None:
        """Go on from what `state` returned for the same model, config and images.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        tensors, data = state
        self._course = from_plain(DescentProgress, data["course"])
        self._rng.bit_generator.state = data["random"]
        for name, values in self._features.steps.items():
            values["scale"].copy_(_like(values["scale"], tensors[f"steps/{name}"]))
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, leaf in enumerate(self._leaves):
                leaf.copy_(_like(leaf, tensors[f"leaf/{index}"]))
                own = f"adam/{index}/"
                if found := {key.removeprefix(own): value for key, value in tensors.items() if key.startswith(own)}:
                    moments[index] = {k: _like(torch.zeros(()) if k == "step" else leaf, v) for k, v in found.items()}
        self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})

    @property
    def _leaves(self) -> list[Tensor]:
        return [leaf for group in self._adam.param_groups for leaf in group["params"]]

    def _parameters(self, activation_rate: float, rounding_rate: float) -> list[dict[str, Any]]:
        """Adam's parameter groups: leaves by the multiple of the learning rate at which they move."""
        by_rate: dict[float, list[Tensor]] = {}
        for group in self._groups:
            rate = group.weight_rate if group.offset is None else activation_rate
            by_rate.setdefault(rate, []).extend(leaf for leaf in (group.log_scale, group.offset) if leaf is not None)
            if group.shift is not None:
                by_rate.setdefault(rounding_rate, []).append(group.shift)
        return [{"params": leaves, "factor": rate} for rate, leaves in by_rate.items()]

    def assignment(self) -> Assignment:
        """The scales as they are now, by site name."""
        return {s.name: g.qparams(s, self._twin.get(s.name)) for g in self._groups for s in g.sites}

    def _step(self, index: int, batch: Batch, teacher: Tensor) -> float:
        """Each part of the batch runs on one rank; the loss is that of the whole batch, on every rank.

        Gradients are summed part by part in a fixed order, so they do not depend on which rank had which part.
        """
        leaves = self._leaves
        sizes = [leaf.numel() for leaf in leaves]
        parts = _parts(batch)
        graphs: dict[int, _Graph] = {}
        outputs = torch.zeros_like(teacher)
        for number, (part, rows) in enumerate(parts):
            if self._world.mine(number):
                graphs[number] = self._forward((index, number), part, part.images / batch.images)
                outputs[rows] = graphs[number].outputs.detach()
        loss, pull = self._pulled(self._world.sum(outputs), teacher)
        if self._feature_weight and self._course.steps == 0:
            excess = float(loss - self._loss(teacher, teacher)) if self._follows else 1.0
            apart = [float(graphs[i].features.detach()) if i in graphs else 0.0 for i in range(len(parts))]
            self._balance(excess, apart)
        total = outputs.new_zeros(sum(sizes))
        for first in range(0, len(parts), self._world.size):
            around = range(first, min(first + self._world.size, len(parts)))  # a part of each rank
            mine = [i for i in around if i in graphs]
            found = {i: graphs.pop(i).gradient(leaves, pull[parts[i][1]], self._course.feature_pull) for i in mine}
            for number in around:
                total += self._world.sum(found[number] if number in found else torch.zeros_like(total))
        # A scale whose gradient is no number (infinite padding in front of it) stays where it is in this step.
        for leaf, gradient in zip(leaves, torch.split(total.nan_to_num_(0.0, 0.0, 0.0), sizes), strict=True):
            leaf.grad = gradient.reshape(leaf.shape)
        self._adam.step()
        for group in self._groups:
            group.confine()
        self._course.steps += 1
        return float(loss)

    def _pulled(self, outputs: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to the outputs; none where it has none."""
        if not self._follows:
            return self._loss(outputs, teacher), torch.zeros_like(outputs)
        outputs.requires_grad_()
        with torch.enable_grad():
            loss = self._loss(outputs, teacher)
        return loss.detach(), torch.autograd.grad(loss, outputs)[0]

    def _forward(self, key: tuple[int, int], part: Batch, share: float) -> _Graph:
        """Of a part that is so much of its batch."""
        self._images += part.images
        wanted = self._features.wanted(key, part) if self._feature_weight else None
        watching: AbstractContextManager[LayerInputs]
        watching = nullcontext({}) if wanted is None else self._twin.seeing_inputs()
        args, kwargs = own_inputs(part)
        with torch.enable_grad():
            values = {site.name: group.values() for group in self._groups for site in group.sites}
            with watching as inputs:
                outputs = compared(self._twin.call(values, *args, **kwargs), self._select)
            features = outputs.new_zeros(()) if wanted is None else distance(inputs, wanted) * share
        return _Graph(outputs, features)

    def _balance(self, excess: float, features: Sequence[float]) -> None:
        """Let the features count so many times the loss, both as they are now.

        Args:
            excess: of the loss over that of the teacher's own outputs.
            features: of each part; 0 where another rank has it.
        """
        apart = float(self._world.sum(torch.tensor(features)).sum())
        self._course.feature_pull = self._feature_weight * abs(excess) / apart if apart > 0 else 0.0


def _like(tensor: Tensor, saved: Tensor) -> Tensor:
    if saved.shape != tensor.shape or saved.dtype != tensor.dtype or not bool(torch.isfinite(saved).all()):
        raise ValueError(
            f"expected finite numbers of shape {tuple(tensor.shape)} and {tensor.dtype}, got {saved.dtype} of "
            f"{tuple(saved.shape)}"
        )
    return saved


def _parts(batch: Batch) -> list[tuple[Batch, slice]]:
    """The parts of a batch that may run on a rank of their own, with their rows of the output."""
    numbers = sum(value.numel() for value in batch.tensors.values())
    return batch.parts(round(numbers / _PART_NUMBERS))
