"""Scales proposed by gradient descent on the float twin: Adam on log scales, straight through the rounding, and on
which way each weight is rounded.

The twin cannot see what only the kernels do (saturation), so what comes from here is a proposal: the loop accepts
it where the kernels confirm it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.plain import from_plain
from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.search.proposals.batch_gradient import BatchGradient
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.learnable_qparams import NO_UNITS, LearnableScales
from cptv_ao.search.proposals.scale_optimizer import ScaleOptimizer, like
from cptv_ao.search.proposals.schedule import DescentProgress, Schedule
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.twin import Twin

# Share of a descent that is only its beginning.
_YOUNG = 0.25
# Share of the learning rate that is left after the descent was sent back; and what is left of it when a descent of
# which the kernels have accepted nothing ends: after the second time.
_BACK_OFF, _GIVES_UP = 0.5, 0.25


#: Of a descent: its tensors, and what JSON can hold.
State = tuple[dict[str, Tensor], dict[str, Any]]


class GradientDescent:
    """Adam on the scales and zero_points of the twin.

    Args:
        twin: the twin of the model with the scales to start from.
        groups: the tied groups that are searched, by the name of their leader.
        objective: what is followed.
        activation_rate: multiple of the learning rate at which activations move; weights move at the rate itself,
            those of many codes slower.
        rounding_rate: multiple of the learning rate at which the shifts of the weights move; 0: weights are rounded as
            they are.
        units: of weights (C,), of what is added to their biases, where that is learnt.
        rng: draws the order of the batches.
        world: the ranks that share the images of a step.
    """

    def __init__(
        self,
        twin: Twin,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        objective: Objective,
        *,
        activation_rate: float = 1.0,
        rounding_rate: float = 0.0,
        units: Mapping[str, Tensor] = NO_UNITS,
        rng: np.random.Generator,
        world: World = ALONE,
    ) -> None:
        twin.reround_weights()
        #: what it moves
        self.scales = LearnableScales(twin, groups, rounding_rate > 0, units)
        self._gradient = BatchGradient(twin, self.scales.groups, objective, world)
        self._optimizer = ScaleOptimizer(self.scales.groups, activation_rate, rounding_rate)
        self._rng, self._progress = rng, DescentProgress()

    @property
    def image_forwards(self) -> int:
        """Images that went through the twin on this rank; forward and backward count as three."""
        return self._gradient.image_forwards

    def go_on(self, scales: Callable[[str], QParams]) -> None:
        """What was proposed was accepted, as these scales (by site name); if it was a part of the way to what was
        proposed first, go on from there with steps as much smaller."""
        self.scales.hold(scales)
        at = self._progress
        at.caution *= at.share
        at.accepted, at.halvings = True, 0

    def go_half_back_to(self, scales: Callable[[str], QParams]) -> None:
        """Propose what is half-way between what was refused and other scales (by site name)."""
        self.scales.go_to(scales, 0.5)
        self._progress.halvings += 1

    def go_back_to(self, scales: Callable[[str], QParams]) -> None:
        """What was proposed was refused: go on from other scales (by site name), at half the learning rate; or not at
        all, where that is the second time, and nothing was ever accepted. A young descent goes on from where it was."""
        at = self._progress
        if not at.young:
            self.scales.go_to(scales)
            self._optimizer.forget_direction()
            at.caution *= _BACK_OFF
            at.over = at.over or (at.caution <= _GIVES_UP and not at.accepted)
        elif at.halvings:
            self.scales.go_to(scales, 1 - 1 / at.share)
        at.halvings = 0

    def run(
        self,
        images: StepImages,
        schedule: Schedule,
        on_step: Callable[[float], None] | None = None,
        going: Callable[[], bool] = lambda: True,
        on_pause: Callable[[bool], None] | None = None,
    ) -> Iterator[tuple[str, Callable[[], Assignment]]]:
        """Descend; yield what is to be tried on the kernels, with its name, at the marks of the schedule and at the
        end.

        `on_step` is given the loss of each step's batch; `going` is asked before each step whether to go on, and
        `on_pause` called, when `state` says all that there is: with True at the start, behind what was yielded, and
        where it does not go on.
        """
        at, told = self._progress, -1
        if not self._gradient.begin(images):
            return
        while at.halvings or (not at.over and (progress := schedule.progress(at.steps)) < 1.0):
            goes_on = going()
            if on_pause is not None:
                on_pause((at.proposals != told and not at.halvings) or not goes_on)
                told = told if at.halvings else at.proposals
            if not goes_on:
                break
            if at.halvings:
                yield at.name, self.scales.assignment
                continue
            self._step(images, schedule.rate(progress), on_step)
            if (passed := schedule.marks_passed(at.steps)) > at.proposals:
                at.young = schedule.progress(at.steps) < _YOUNG
                yield at.proposed(passed), self.scales.assignment
        else:
            at.over = True
        if at.steps > at.proposed_at:  # the seconds were over before
            yield at.proposed(at.proposals + 1), self.scales.assignment
            while at.halvings:
                yield at.name, self.scales.assignment

    def run_ahead(
        self,
        images: StepImages,
        schedule: Schedule,
        on_step: Callable[[float], None] | None,
        going: Callable[[int], bool],
    ) -> None:
        """Descend while what was yielded last is tried; `going` is asked before each step, by how many there were."""
        at, steps = self._progress, 0
        while not (at.over or at.halvings) and (progress := schedule.progress(at.steps)) < 1.0 and going(steps):
            self._step(images, schedule.rate(progress), on_step)
            steps += 1

    @property
    def steps(self) -> int:
        """So far."""
        return self._progress.steps

    @property
    def young(self) -> bool:
        """Whether less than a quarter of it was over when something was last proposed."""
        return self._progress.young

    @property
    def halvings(self) -> int:
        """How often it has gone half of the way back from what was last proposed."""
        return self._progress.halvings

    @property
    def over(self) -> bool:
        """Whether it has come to its end, and nothing has stopped it before: that of the schedule, or its own."""
        return self._progress.over

    def state(self) -> State:
        """Where the descent is between two steps, for `set_state`."""
        tensors = {name: tensor.cpu() for name, tensor in (self._kept | self._optimizer.state()).items()}
        return tensors, {
            "course": asdict(self._progress),
            "random": self._rng.bit_generator.state,
        }

    def set_state(self, state: State) -> None:
        """Go on from what `state` returned for the same model, config and images.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        tensors, data = state
        self._progress = from_plain(DescentProgress, data["course"])
        self._rng.bit_generator.state = data["random"]
        for name, kept in self._kept.items():
            kept.copy_(like(kept, tensors[name]))
        self._optimizer.set_state(tensors)

    @property
    def _kept(self) -> dict[str, Tensor]:
        """What holds from its first step on."""
        steps = {f"steps/{name}": values["scale"] for name, values in self._gradient.features.steps.items()}
        return steps | {f"units/{name}": unit for name, unit in self.scales.units.items()}

    def _step(self, images: StepImages, rate: float, on_step: Callable[[float], None] | None) -> None:
        """Move the scales by what the batch that is next says."""
        at = self._progress
        index = at.next_batch(self._rng, len(images))
        pull = at.feature_pull if at.steps else None
        loss, gradient, at.feature_pull = self._gradient.of(index, *images.at(index), self._optimizer.leaves, pull)
        self._optimizer.step(gradient, rate * at.caution)
        at.steps += 1
        told = float(loss)  # the same on every rank; not before, for a GPU is waited for here
        if on_step is not None:
            on_step(told)
