"""Individuals of the initial population besides the observers' scales; each is tried on the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import hooked
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment, QParams, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.cost import halved
from cptv_ao.fx.running import call
from cptv_ao.simulation.qtensor import QTensor, dequantize
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer

# Multiples of a weight scale that are tried per channel.
_FACTORS = tuple(float(f) for f in torch.logspace(-0.45, 0.1, 23))
# After reduce_range half the scale uses the whole container, twice the scale leaves it.
HALF_CONTAINER = REDUCED_QMAX / 255
# Rows of inputs of a layer on which errors of its weight are weighed, at most and at least.
_ROWS, _LEAST_ROWS = 16_384, 64

Proposal = tuple[str, Callable[[], Assignment]]
"""What an individual is, and its scales; these are computed when they are asked for."""
Meanwhile = Callable[[Callable[[], bool]], None]
"""What may go on while one is scored, without touching the model; asks whether that is over."""


def individuals(
    chosen: Collection[str],
    twin: Twin,
    groups: Mapping[str, tuple[ScaleSite, ...]],
    limited: Collection[str],
    now: Callable[[str], QParams],
    batch: Batch,
    most_flops: float,
) -> Iterator[Proposal]:
    """The individuals that are worth a try: per-channel weight scales, then the ranges of the activations.

    Args:
        chosen: `output_error`, `ranges`.
        twin: of the model as it was given.
        groups: the tied groups that are searched.
        limited: leaders of the groups whose codes must stay below 128, or kernels saturate.
        now: reads the scales that are in the model.
        batch: search images, of which 64 say enough.
        most_flops: as of `output_error_scales`.
    """
    weights = [name for name, group in groups.items() if group[0].kind == "weight"]
    if weights and "output_error" in chosen:
        yield "weight scales of least output error", partial(output_error_scales, twin, weights, batch, most_flops)
    ranges = "ranges" in chosen
    free = [site for lead, group in groups.items() if lead not in limited for site in group if site.affine]
    if ranges and free:
        yield "whole range where no kernel saturates", partial(_all_rescaled, free, HALF_CONTAINER, now)
    narrow = [site for lead in limited for site in groups[lead]]
    if ranges and narrow:
        yield "half the range where kernels saturate", partial(_all_rescaled, narrow, 1 / HALF_CONTAINER, now)


def _all_rescaled(sites: Sequence[ScaleSite], factor: float, now: Callable[[str], QParams]) -> Assignment:
    return {site.name: rescaled(now(site.name), factor, site) for site in sites}


def output_error_scales(twin: Twin, names: Collection[str], batch: Batch, most_flops: float = math.inf) -> Assignment:
    """Per channel, the multiple of the weight scale that least changes the layer's output on float inputs.

    The error of channel c is sum((x * (s round(w / s) - w))^2) over rows x of the inputs that the layer sees.

    Args:
        twin: of the model.
        names: of the weight sites.
        batch: search images.
        most_flops: floating point operations that it may take beside a forward; fewer rows are looked at for fewer.
    """
    layers = [one for one in twin.layers if one.weight.site.name in names and one.weight.weight is not None]
    shapes, found = [layer.weight.codes.shape for layer in layers], dict[str, QParams]()
    rows = halved(_ROWS, _LEAST_ROWS, lambda rows: sum(_flops(shape, rows) for shape in shapes), most_flops)

    def see(layer: Any, args: tuple[Any, ...]) -> None:  # at once: the inputs of all layers would fill the memory
        found[layer.weight.site.name] = _least_error(layer, args[0], rows)

    with torch.no_grad(), twin.in_float(twin.names), hooked([one.register_forward_pre_hook(see) for one in layers]):
        call(twin, batch)
    return found


def _flops(weight: Sequence[int], rows: int) -> float:
    """Of all factors of a weight (C, ...), where inputs have so many rows: of their Gram matrix if that is smaller."""
    columns = math.prod(weight[1:])
    gram = rows * columns**2 if rows > columns else 0.0
    return 2.0 * (gram + len(_FACTORS) * weight[0] * columns * min(rows, columns))


def _least_error(layer: WeightedLayer, value: QTensor | Tensor, rows: int) -> QParams:
    weight, scale = layer.weight, layer.weight.scale
    error_at = layer.weight_error(dequantize(value), rows)
    best, chosen = torch.full_like(scale, torch.inf), scale.clone()
    for factor in _FACTORS:
        error = error_at(scale * factor)
        error = error.sum() if scale.dim() == 0 else error
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale * factor, chosen)
    return QParams(chosen.double().cpu(), weight.zero_point.long().cpu())
