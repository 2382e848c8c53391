"""Ranges that the functions behind them clip, cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.qparams import REDUCED_QMAX, qparams_for_range
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.transforms.lowered_patterns import ClippedSite

# Images on which codes are looked at.
_FEW = 16


# A range below 0 is left where it is a smaller share of the rest, as a search leaves it.
_WASTE = 0.1


#: Share of the codes of one activation beyond 7 bits that says that all 8 are used.
BEYOND = 0.1
# How far beyond: values at the end of a range, as the background of images may be, are rounded one code further.
_FURTHER = 8


def cut_range(backend: Backend, clipped: ClippedSite, codes: int) -> bool:
    """Take the range that nothing passes through away, where some is below 0; False where it is not worth it."""
    qparams, site = backend.read(clipped.site), backend.sites[clipped.site]
    below = int(qparams.zero_point) - site.qmin
    high = min(clipped.high, float(qparams.scale) * (codes - below))
    if float(qparams.scale) * below <= _WASTE * high or high <= 0:
        return False
    for name in {clipped.site, backend.rewrites.passed.get(clipped.site, clipped.site)}:
        backend.write(name, qparams_for_range(0.0, high, site, codes))
    return True


def shares_beyond_half(backend: Backend, batch: Batch, sites: Iterable[ScaleSite]) -> dict[str, float]:
    """Share of the codes of these activations that lie well beyond half of the container, by node."""
    shares, observed = dict[str, float](), {node for site in sites for node in site.nodes}

    def see(node: Node, value: Any) -> Any:
        if node.name in observed and isinstance(value, Tensor) and value.dtype == torch.quint8:
            shares[node.name] = float((value.int_repr() > REDUCED_QMAX + _FURTHER).float().mean())
        return value

    Watcher(backend.model).watch(batch, see)
    return shares


def observed_codes(backend: Backend, batch: Batch, world: World) -> int:
    """Steps between the least and the greatest code that observers calibrated for: half of the container where hardly
    any code of any value is beyond it (reduce_range)."""
    activations = [site for site in backend.sites.values() if site.kind == "activation" and not site.fixed]
    shares = shares_beyond_half(backend, batch.few(_FEW), activations)
    return REDUCED_QMAX if world.first(max(shares.values(), default=0.0)) < BEYOND else 2 * REDUCED_QMAX + 1
