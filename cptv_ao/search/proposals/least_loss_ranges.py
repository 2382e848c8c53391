"""Activation ranges that least change the loss, to second order, all from a few images in float.

Observers look at a site's values alone. Here each value counts what the outputs make of it: an outlier that they need
is kept, one that they do not see is clipped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
# Share of the seconds of a limited search.
_SHARE = 0.15


class LeastLossRanges:
    """Finds the ranges of all activations that are searched.

    Args:
        twin: of the model; written: scales.
        groups: the tied groups that are searched, by the name of their leader.
        images: of which some are followed.
        calibration: for the loss and the cost of a forward.
    """

    def __init__(
        self, twin: Twin, groups: Mapping[str, tuple[ScaleSite, ...]], images: StepImages, calibration: Calibration
    ) -> None:
        self._twin, self._images, self._calibration = twin, images, calibration
        self._groups = {lead: group for lead, group in groups.items() if group[0].kind == "activation"}
        #: images run through the twin so far; forward and backward count as three
        self.image_forwards = 0

    def assignment(self, store: ScaleStore, limited: Collection[str]) -> Assignment:
        """The ranges, by site name.

        Args:
            store: whose scales there are now.
            limited: leaders of the groups whose codes must stay where no kernel saturates.
        """
        config, parts = self._calibration.config, self._parts()
        self.image_forwards += _FORWARDS * sum(part.images for part, _ in parts)
        follow(self._twin, store)
        groups = {lead: _limited(group) if lead in limited else group for lead, group in self._groups.items()}
        return least_loss_ranges(self._twin, groups, parts, config.loss, config.select)

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


def least_loss_ranges(
    twin: Twin,
    groups: Mapping[str, tuple[ScaleSite, ...]],
    parts: Sequence[tuple[Batch, int]],
    loss: LossChoice,
    select: Select,
) -> Assignment:
    """Scales and zero_points of the activations, each group's as if it alone were quantized.

    Args:
        twin: whose present scales they are measured in.
        groups: tied groups of activations, by the name of their leader, with the codes that they may use.
        parts: images, of each of which the outputs are followed in one random direction an image; and how many
            directions, each of as many of them, are told apart.
        loss: whose second order counts.
        select: picks the output that it compares.
    """
    histograms = {name: ErrorHistogram() for name in groups}
    sites = [(name, site) for name, group in groups.items() for site in group if site.kind == "activation"]
    leads = {site.name: name for name, site in sites if site.name in twin.names}
    generator = torch.Generator().manual_seed(0)
    for part, directions in parts:
        pull = partial(_pull, loss=loss, select=select, generator=generator)
        seen = steps_and_gradients(twin, leads, part, pull)
        for direction in range(directions):
            for histogram in histograms.values():
                histogram.begin()
            for name, found in seen.items():
                for steps, gradient in found:
                    own = _rows(len(steps), part.images, direction, directions)
                    histograms[leads[name]].add(steps[own], gradient[own])
    chosen = {
        name: histograms[name].least_error(group[0], twin.sites.get(name))
        for name, group in groups.items()
        if name in leads
    }
    return {site.name: chosen[name] for name in chosen for site in groups[name]}


def _rows(count: int, images: int, direction: int, directions: int) -> slice:
    """Those of so many rows that the images of a direction have; the first has all where rows are not of images."""
    if count % images:
        return slice(0, 0 if direction else count)
    each = count // images
    return slice(images * direction // directions * each, images * (direction + 1) // directions * each)


def _pull(output: Any, *, loss: LossChoice, select: Select, generator: torch.Generator) -> Tensor:
    return random_direction(loss, compared(output, select), generator)
