"""Activations on their whole container where kernels saturate on it, paid for by the weights that read them.

Kernels that add products in pairs of int16 hold 255 (a + b) of two weight codes up to 32767. Either activations stay
below code 128, for which observers calibrate (`reduce_range`): a bit less for all of them. Or no two codes of a row add
up to more than 128: for rows with a single large weight nothing, for others up to one bit of weights that were given
eight, and whose error is the same in every image, so that corrected biases take much of it back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment, QParams, rescaled
from cptv_ao.core.sites import ScaleSite
from cptv_ao.core.weight_rounding import weight_steps
from cptv_ao.search.proposals.initial_scales import HALF_CONTAINER
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.modules import QuantizedLayer
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.saturation import input_sites
from cptv_ao.simulation.twin import Twin

# What the two largest codes of a row may add up to: 32767 / 255, less half a code for the rounding of each.
_PAIR = 32767 // 255 - 1


def narrower_weights(
    twin: Twin,
    groups: Mapping[str, tuple[ScaleSite, ...]],
    limited: Collection[str],
    now: Callable[[str], QParams],
    batch: Batch,
) -> dict[str, Assignment]:
    """Scales of activations on their whole container, each with those of the weights that read it.

    Args:
        twin: of the model, with the scales `now`.
        groups: the tied groups that are searched, by the name of their leader.
        limited: leaders of the activations whose codes must stay below 128, or kernels saturate.
        now: reads the scales that are in the model.
        batch: a few search images, which tell whether codes stay there.

    Returns:
        By leader, without those whose weights may not move alone: qparams by site name.
    """
    given = layer_inputs(twin, batch)
    sites = input_sites(twin, given)
    found: dict[str, Assignment] = {}
    for lead in limited:
        group = groups[lead]
        names = {site.name for site in group}
        readers = [layer for layer, name in sites.items() if name in names]
        if readers and all(_is_free(layer, groups) for layer in readers):
            reduced = max(_highest(given[layer]) for layer in readers) <= REDUCED_QMAX
            factor = HALF_CONTAINER if reduced else 1.0
            found[lead] = {site.name: rescaled(now(site.name), factor, site) for site in group}
            found[lead] |= {layer.weight.site.name: _narrower(layer, now) for layer in readers}
    return found


def _is_free(layer: QuantizedLayer, groups: Mapping[str, tuple[ScaleSite, ...]]) -> bool:
    """Whether the scale of its weight may move, alone, and its codes can be rounded anew."""
    return len(groups.get(layer.weight.site.name, ())) == 1 and layer.weight.weight is not None


def _narrower(layer: QuantizedLayer, now: Callable[[str], QParams]) -> QParams:
    """Of the weight of a layer, on which no two products with one of its rows are too large."""
    site, weight = layer.weight.site, layer.weight.weight
    assert weight is not None
    given = now(site.name)
    steps = weight_steps(weight, given.scale.float().to(weight.device), site.axis).abs()
    rows = steps.reshape(1, -1) if site.axis is None else steps.movedim(site.axis, 0).flatten(1)
    pairs = rows.topk(min(2, rows.shape[1])).values.sum(1)
    factor = (pairs / _PAIR).clamp_min(1.0).double().cpu()
    return replace(given, scale=given.scale * factor.reshape(given.scale.shape))


def _highest(value: QTensor | Tensor) -> int:
    """Code, with its zero_point."""
    assert isinstance(value, QTensor)
    return int((value.codes + value.zero_point).max())
