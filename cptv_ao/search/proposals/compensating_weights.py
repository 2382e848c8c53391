"""Weights that give back what quantization took before them, in closed form: each layer, as it is given the values that
the rounded layers before it make, comes as near as it can to what it gives in float. Its weights in float move there by
regression (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695), are rounded for these inputs, and each channel's scale
is fitted to its codes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import hooked
from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import shift_of
from cptv_ao.fx.running import call
from cptv_ao.search.proposals.sequential_rounding import (
    affordable_columns,
    column_parts,
    input_rows,
    rounded_in_turn,
    steps_and_ends,
)
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.quantizers import WeightQuantizer
from cptv_ao.simulation.twin import Twin

# What is added to the diagonal of a Gram matrix before a regression, in its mean, beside the columns per row: the fewer
# rows, the less they say about how a weight should move.
_DAMPING = 0.05
# A scale moves by this factor at most.
_SCALE = 1.1


def _is_roundable(twin: Twin, site: ScaleSite) -> bool:
    """Whether it matters which of two codes a weight is rounded to, and it need not be the nearest."""
    return site.axis in (None, 0) and site.is_coarse and twin.sites.shiftable_weight(site.name) is not None


def compensating_weights(twin: Twin, names: Collection[str], batch: Batch, most_flops: float = math.inf) -> Assignment:
    """Scales and roundings for layers that run once, found in one forward in float and one of the twin.

    Args:
        twin: at the scales to start from; left as it was.
        names: of the weight sites that may have other scales, and be rounded otherwise than to the nearest code.
        batch: search images.
        most_flops: as of `sequential_roundings`.
    """
    layers = [one for one in twin.layers_alone(names) if _is_roundable(twin, one.weight.site)]
    most = affordable_columns([layer.weight.codes.shape for layer in layers], most_flops)
    with twin.in_float(twin.names):
        wanted = layer_inputs(twin, batch)
    found: Assignment = {}

    def compensate(layer: Any, args: tuple[Any, ...]) -> None:
        given, in_float = input_rows(layer, args[0]), input_rows(layer, wanted.pop(layer))
        if given is not None and in_float is not None:
            name = layer.weight.site.name
            found[name] = _compensating(layer.weight, given, in_float, twin.sites.get(name), most)
            twin.sites.set(name, found[name])

    before = {layer.weight.site.name: twin.sites.state(layer.weight.site.name) for layer in layers}
    try:
        with torch.no_grad(), hooked([layer.register_forward_pre_hook(compensate) for layer in layers]):
            call(twin, batch)
    finally:
        for name, state in before.items():
            twin.sites.restore(name, state)
    return found


def _compensating(quantizer: WeightQuantizer, given: Tensor, in_float: Tensor, now: QParams, most: int) -> QParams:
    """Of inputs as they are and in float, (groups, n, K), and as many columns as are looked at together."""
    weight, site = quantizer.weight, quantizer.site
    assert weight is not None
    steps, low, high, zero_point = steps_and_ends(quantizer)
    codes, fits = list[Tensor](), list[Tensor]()
    parts = zip(*(part.chunk(len(given)) for part in (steps, low, high)), given, in_float, strict=True)
    for group in parts:
        found = [_of_columns(*own) for own in zip(*(column_parts(part, most) for part in group), strict=True)]
        codes.append(torch.cat([rounded for rounded, _ in found], 1))
        fits.append(torch.stack([fit for _, fit in found]).sum(0))
    scale = now.scale * _factor(torch.cat(fits, 1), site.axis).double().cpu()
    chosen = torch.cat(codes).reshape(weight.shape) + zero_point
    moved = QParams(scale, now.zero_point, None, now.correction)
    return QParams(scale, now.zero_point, shift_of(weight.cpu(), chosen.cpu(), moved, site), now.correction)


def _of_columns(own: Tensor, low: Tensor, high: Tensor, ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights in steps and their ends (C, K), and inputs as they are and in float (n, K): the weights, rounded
    (C, K), and products of outputs for `_factor` (2, C)."""
    gram, cross = ours.T @ ours, theirs.T @ ours
    rounded = rounded_in_turn(own + _regressed(own, gram, cross, len(ours)), low, high, gram, own)
    return rounded, torch.stack([((own @ cross) * rounded).sum(1), ((rounded @ gram) * rounded).sum(1)])


def _regressed(steps: Tensor, gram: Tensor, cross: Tensor, rows: int) -> Tensor:
    """By how much weights (C, K) move so that their products with inputs come near to what they were in float."""
    damped, columns = gram.double(), len(gram)
    by = (_DAMPING + columns / rows) * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny
    factor = torch.linalg.cholesky(damped + by * torch.eye(columns, dtype=damped.dtype, device=damped.device))
    missing = steps.double() @ (cross - gram).double()
    return torch.cholesky_solve(missing.T, factor).T.to(steps.dtype)


def _factor(fits: Tensor, axis: int | None) -> Tensor:
    """Of scales, (C,) or (), from products of outputs (2, C): of the float ones with ours, and of ours with ours."""
    product, square = fits if axis is not None else fits.sum(1)
    return torch.where(square > 0, product / square, 1.0).clamp(1 / _SCALE, _SCALE)
