"""What a report says of residual streams whose range a few channels set: no scale helps, a rotation does."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.channel_scaling import FEW_OUTLIERS, outlier_ratio
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.transforms.channel_ranges import last_dimension
from cptv_ao.transforms.equalize import rotatable


def stream_notes(backend: Backend, few: Batch) -> list[str]:
    """A sentence where sums of a residual stream have outlier channels, which a rotation spreads over all.

    Args:
        backend: of the lowered model.
        few: some search images, on which the model is run where it has such sums.
    """
    sites = {backend.sites[name].nodes[0] for name in rotatable(backend)}
    if not sites:
        return []
    ratios = _outlier_ratios(backend, few, sites)
    if not ratios:
        return []
    return [
        f"a few channels set the range of {len(ratios)} of {len(sites)} sums of the residual stream (up to "
        f"{max(ratios):.0f}x the median channel), which no scale makes up for: refine, given float_model, spreads them "
        "over all channels if the layers allow it (recipe, before the model is quantized, also where a norm begins it)"
    ]


def _outlier_ratios(backend: Backend, few: Batch, nodes: set[str]) -> list[float]:
    """The largest value of a channel, as a multiple of the median channel's, of those nodes where a few stand out."""
    found = list[float]()

    def see(node: Node, value: Any) -> Any:
        if node.name in nodes:
            ratio, count = outlier_ratio(last_dimension(value.dequantize()).abs().amax(1)) or (0.0, 0)
            if 0 < count <= FEW_OUTLIERS and math.isfinite(ratio):
                found.append(ratio)
        return value

    Watcher(backend.model).watch(few, see)
    return found
