"""Activation ranges that least change the loss, to second order, all from a few images in float.

Observers look at a site's values alone. Here each value counts what the outputs make of it: an outlier that they need
is kept, one that they do not see is clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.batches import Batch
from cptv_ao.core.image_subsets import spread_images
from cptv_ao.core.loss_curvature import random_direction
from cptv_ao.core.losses import LossChoice
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.tensors import Select, compared
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.batch_gradient import largest_part
from cptv_ao.search.proposals.error_histogram import ErrorHistogram
from cptv_ao.search.proposals.following import follow
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.activations import steps_and_gradients
from cptv_ao.simulation.twin import Twin

# Images that are followed, at most and at least; what one costs, in forwards of the float network; in how many parts at
# least, each with a direction of its own, where there are as many images.
_IMAGES, _LEAST, _FORWARDS, _PARTS = 64, 8, 3, 32
# Images that a GPU runs at once, each few with a direction of their own: a forward of 2 takes as long there.
_AT_ONCE_ON_GPU = 32
# Share of the seconds of a limited search: of those that are planned, and of those that it takes.
_SHARE = 0.15


class LeastLossRanges:
    """Finds the ranges of all activations that are searched.

    Args:
        twin: of the model.
        groups: the tied groups that are searched, by the name of their leader.
        images: of which some are followed.
        calibration: for the loss and the cost of a forward.
        budget: asked after each part whether to go on.
    """

    def __init__(
        self,
        twin: Twin,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        images: StepImages,
        calibration: Calibration,
        budget: Budget,
    ) -> None:
        self._twin, self._images, self._calibration, self._budget = twin, images, calibration, budget
        self._groups = {lead: group for lead, group in groups.items() if group[0].kind == "activation"}
        self._errors: SiteErrors | None = None
        self._left: list[tuple[Batch, int]] = []
        #: images run through the twin so far; forward and backward count as three
        self.image_forwards = 0

    @property
    def done(self) -> bool:
        """Whether all images were looked at."""
        return self._errors is not None and not self._left

    def assignment(self, store: ScaleStore, limited: Collection[str], few: bool = False) -> Assignment:
        """The ranges, by site name.

        Args:
            store: whose scales there are now.
            limited: leaders of the groups whose codes must stay where no kernel saturates.
            few: look at the first few images only; the next call goes on with the others.
        """
        config = self._calibration.config
        if self._errors is None:
            follow(self._twin, store)
            self._errors = SiteErrors(self._twin, self._groups, config.loss, config.select)
            self._left = self._parts()
        end = self._budget.end_of(_SHARE)
        while self._left and not (self._errors.images >= _LEAST and (few or not self._budget.left_until(end))):
            self._errors.add(*self._left.pop(0))
        self.image_forwards = _FORWARDS * self._errors.images
        return self._errors.ranges(
            {lead: _limited(group) if lead in limited else group for lead, group in self._groups.items()}
        )

    def _parts(self) -> list[tuple[Batch, int]]:
        """What is run at once, and how many directions that has."""
        images = self._calibration.cost.images(_IMAGES, forwards=_FORWARDS, share=_SHARE, least=_LEAST)
        most = min(largest_part(self._twin), max(1, images // _PARTS))
        batches = spread_images(self._images.batches, images)
        if self._twin.device.type == "cpu":
            return [(part, 1) for batch in batches for part, _ in batch.parts(-(-batch.images // most))]
        at_once = min(largest_part(self._twin), max(most, _AT_ONCE_ON_GPU))
        parts = [part for batch in batches for part, _ in batch.parts(-(-batch.images // at_once))]
        return [(part, -(-part.images // most)) for part in parts]


def _limited(group: tuple[ScaleSite, ...]) -> tuple[ScaleSite, ...]:
    return tuple(replace(site, qmax=min(site.qmax, REDUCED_QMAX)) for site in group)


class SiteErrors:
    """What the outputs make of errors at each activation, from images in float, a part after another.

    Args:
        twin: in whose present scales errors are measured, whatever it holds later.
        groups: tied groups of activations, by the name of their leader.
        loss: whose second order counts.
        select: picks the output that it compares.
    """

    def __init__(
        self, twin: Twin, groups: Mapping[str, tuple[ScaleSite, ...]], loss: LossChoice, select: Select
    ) -> None:
        sites = [(lead, site) for lead, group in groups.items() for site in group if site.kind == "activation"]
        self._twin, self._leads = twin, {site.name: lead for lead, site in sites if site.name in twin.names}
        self._now = {name: twin.sites.get(name) for name in self._leads}
        self._histograms = {lead: ErrorHistogram() for lead in groups}
        self._pull = partial(_pull, loss=loss, select=select, generator=torch.Generator().manual_seed(0))
        #: that were followed so far
        self.images = 0

    def add(self, part: Batch, directions: int) -> None:
        """Follow the outputs of some images.

        Args:
            part: each of its images in one random direction.
            directions: how many of them, each of as many images, are told apart.
        """
        self.images += part.images
        scales = {name: self._now[name].scale for name in self._leads}
        seen = steps_and_gradients(self._twin, scales, part, self._pull)
        for direction in range(directions):
            for histogram in self._histograms.values():
                histogram.begin()
            for name, found in seen.items():
                for steps, gradient in (map(torch.atleast_1d, one) for one in found):
                    own = _rows(len(steps), part.images, direction, directions)
                    self._histograms[self._leads[name]].add(steps[own], gradient[own])

    def ranges(self, groups: Mapping[str, tuple[ScaleSite, ...]]) -> Assignment:
        """Scales and zero_points of least error, each group's as if it alone were quantized.

        Args:
            groups: those of before, with the codes that they may use.
        """
        chosen = {
            lead: self._histograms[lead].least_error(group[0], self._now[lead])
            for lead, group in groups.items()
            if lead in self._now
        }
        return {site.name: chosen[lead] for lead in chosen for site in groups[lead]}


def _rows(count: int, images: int, direction: int, directions: int) -> slice:
    """Those of so many rows that the images of a direction have; the first has all where rows are not of images."""
    if count % images:
        return slice(0, 0 if direction else count)
    each = count // images
    return slice(images * direction // directions * each, images * (direction + 1) // directions * each)


def _pull(output: Any, *, loss: LossChoice, select: Select, generator: torch.Generator) -> Tensor:
    return random_direction(loss, compared(output, select), generator)
