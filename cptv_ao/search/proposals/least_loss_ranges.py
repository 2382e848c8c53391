"""Activation ranges that least change the loss, to second order, all from a few images in float.

Observers look at a site's values alone. Here each value counts what the outputs make of it: an outlier that they need
is kept, one that they do not see is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.loss_curvature import random_direction
from cptv_ao.core.losses import Loss
from cptv_ao.core.qparams import Assignment
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.tensors import Select, compared
from cptv_ao.search.proposals.error_histogram import ErrorHistogram
from cptv_ao.simulation.activations import steps_and_gradients
from cptv_ao.simulation.twin import Twin


def least_loss_ranges(
    twin: Twin, groups: Mapping[str, tuple[ScaleSite, ...]], parts: Sequence[Batch], loss: str | Loss, select: Select
) -> Assignment:
    """Scales and zero_points of the activations, each group's as if it alone were quantized.

    Args:
        twin: whose present scales they are measured in.
        groups: tied groups of activations, by the name of their leader, with the codes that they may use.
        parts: images, of each of which the outputs are followed in one random direction an image.
        loss: whose second order counts.
        select: picks the output that it compares.
    """
    histograms = {name: ErrorHistogram() for name in groups}
    leads = {site.name: name for name, group in groups.items() for site in group if site.name in twin.names}
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for histogram in histograms.values():
            histogram.begin()
        pull = partial(_pull, loss=loss, select=select, generator=generator)
        for name, found in steps_and_gradients(twin, leads, part, pull).items():
            for steps, gradient in found:
                histograms[leads[name]].add(steps, gradient)
    chosen = {
        name: histograms[name].least_error(group[0], twin.get(name)) for name, group in groups.items() if name in leads
    }
    return {site.name: chosen[name] for name in chosen for site in groups[name]}


def _pull(output: Any, *, loss: str | Loss, select: Select, generator: torch.Generator) -> Tensor:
    return random_direction(loss, compared(output, select), generator)
