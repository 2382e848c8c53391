"""Codes of weights that least change the outputs of their layer, in closed form: each column is rounded in turn, and
what that takes from the outputs is given to the columns that are not rounded yet (GPTQ, arXiv 2210.17323; OBQ, arXiv
2208.11580). Here a weight goes to one of the two codes beside it, as in a descent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import Assignment, QParams
from cptv_ao.core.weight_rounding import along_axis, shift_of, weight_steps
from cptv_ao.evaluation.cost import halved
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.qtensor import QTensor, dequantize
from cptv_ao.simulation.quantizers import WeightQuantizer
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer

# Rows of inputs of a batch that a Gram matrix is made of, at most; the share of its mean diagonal that is added to it.
_ROWS, _DAMPING = 16_384, 0.01
# Columns whose errors are handed on to the columns behind them at once.
_BLOCK = 128
# Columns that share a Gram matrix: of more (a layer on a flattened map of features, as in VGG) it takes gigabytes.
_COLUMNS = 5120


def sequential_roundings(
    twin: Twin, names: Collection[str], batches: Sequence[Batch], most_flops: float = math.inf
) -> Assignment:
    """The present scales, with weights that are rounded so.

    Args:
        twin: whose layers are given their inputs: of rounded activations and float weights.
        names: of the weight sites that may be rounded otherwise than to the nearest code.
        batches: search images.
        most_flops: floating point operations that it may take beside forwards; columns in smaller parts take fewer.
    """
    weights = {layer.weight.site.name: layer.weight for layer in twin.layers}
    most = affordable_columns([weights[name].codes.shape for name in names if name in weights], most_flops)
    grams: dict[str, list[Tensor]] = {}
    with twin.in_float(weights):
        for batch in batches:
            for layer, value in layer_inputs(twin, batch).items():
                site = layer.weight.site
                if site.name in names and twin.sites.shiftable_weight(site.name) is not None:
                    rows = input_rows(layer, value)
                    if rows is not None:
                        found = [part.mT @ part for part in column_parts(rows, most)]
                        if (before := grams.setdefault(site.name, found)) is not found:
                            torch._foreach_add_(before, found)
    return {name: _rounded(weights[name], gram, twin.sites.get(name), most) for name, gram in grams.items()}


def input_rows(layer: WeightedLayer, value: QTensor | Tensor) -> Tensor | None:
    """At most so many rows of what a layer is given, (groups, n, K); None where it has none."""
    return layer.rows(dequantize(value), _ROWS)


def affordable_columns(weights: Collection[Sequence[int]], most_flops: float) -> int:
    """How many columns may share a Gram matrix, where weights of these shapes (C, ...) take so many floating point
    operations at most."""
    return halved(_COLUMNS, _BLOCK, lambda columns: sum(_flops(weight, columns) for weight in weights), most_flops)


def _flops(weight: Sequence[int], most: int) -> float:
    """Of the factors of Gram matrices of so many columns, in float64, which counts twice, and of what they hand on."""
    columns = math.prod(weight[1:])
    width = min(columns, most)
    return columns * width * (8 / 3 * width + weight[0])


def column_parts(values: Tensor, most: int) -> tuple[Tensor, ...]:
    """Values (..., K) in parts of so many columns at most, of like sizes."""
    return values.chunk(math.ceil(values.shape[-1] / most), -1)


def _rounded(quantizer: WeightQuantizer, grams: Sequence[Tensor], now: QParams, most: int) -> QParams:
    """Of Gram matrices (groups, k, k) of each part of its columns, of which so many are together."""
    weight, site = quantizer.weight, quantizer.site
    assert weight is not None
    *parts_of, zero_point = steps_and_ends(quantizer)
    columns = list[Tensor]()
    for *own, of_groups in zip(*(column_parts(part, most) for part in parts_of), grams, strict=True):
        groups = zip(*(part.chunk(len(of_groups)) for part in own), of_groups, strict=True)
        columns.append(torch.cat([rounded_in_turn(*group) for group in groups]))
    codes = torch.cat(columns, 1)
    shift = shift_of(weight.cpu(), (codes.reshape(weight.shape) + zero_point).cpu(), now, site)
    return QParams(now.scale, now.zero_point, shift, now.correction)


def steps_and_ends(quantizer: WeightQuantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a known float weight: it in steps of its scale, its least and greatest code, all (C, K) and without the
    zero_point; and this, in a shape that meets the weight."""
    weight, site = quantizer.weight, quantizer.site
    assert weight is not None
    zero_point = along_axis(quantizer.zero_point, site.axis, weight.dim())
    steps = weight_steps(weight, quantizer.scale, site.axis)
    low, high = (torch.broadcast_to(end - zero_point, steps.shape).flatten(1) for end in (site.qmin, site.qmax))
    return steps.flatten(1), low, high, zero_point


def rounded_in_turn(steps: Tensor, low: Tensor, high: Tensor, gram: Tensor, around: Tensor | None = None) -> Tensor:
    """Whole numbers near to `steps` whose products with inputs are near to those of the steps.

    Args:
        steps: weights in steps of their scales (C, K).
        low, high: the least and the greatest code (C, K).
        gram: of the inputs (K, K).
        around: what the numbers are beside, where that is not `steps` (C, K).

    Returns:
        Each the whole number below or above, within the ends (C, K).
    """
    inverse, order = _inverse_factor(gram)
    left, low, high, beside = (part[:, order] for part in (steps, low, high, steps if around is None else around))
    floor, ceiling = (torch.minimum(torch.maximum(code, low), high) for code in (beside.floor(), beside.floor() + 1))
    codes, columns = torch.empty_like(left), left.shape[1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            own = left[:, column]
            codes[:, column] = torch.minimum(torch.maximum(own.round(), floor[:, column]), ceiling[:, column])
            errors[:, column - first] = (own - codes[:, column]) / inverse[column, column]
            left[:, column:last] -= errors[:, column - first, None] * inverse[column, column:last]
        left[:, last:] -= errors @ inverse[first:last, last:]
    return codes[:, order.argsort()]


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of a Gram matrix (K, K), and its order: the largest inputs first."""
    diagonal = gram.diagonal()
    order = diagonal.argsort(descending=True)
    gram = gram[order][:, order].double()
    gram.diagonal().add_(_DAMPING * float(diagonal.mean()) + torch.finfo(diagonal.dtype).tiny)
    lower = torch.linalg.cholesky(gram)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(diagonal.dtype), order
