"""Outlier channels of norms in a lowered model, moved into the weights that read them (arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.channel_scaling import outlier_exponents
from cptv_ao.core.distributed import World
from cptv_ao.core.qparams import QParams, qparams_for_range
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.paths import fetch
from cptv_ao.transforms.channel_ranges import ChannelRange, channel_ends, last_dimension
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.lowered_patterns import ReadNorm


def _smoothable(backend: Backend, norms: Sequence[ReadNorm]) -> list[ReadNorm]:
    """Those whose readers' float weights are known, and not rounded by the graph itself."""
    known = backend.float_weights.keys()
    return [norm for norm in _shiftable(backend, norms) if known >= set(norm.readers)]


def _shiftable(backend: Backend, norms: Sequence[ReadNorm]) -> list[ReadNorm]:
    return [norm for norm in norms if all(map(backend.weights.shiftable, norm.readers))]


def _smoothed(
    backend: Backend, batches: Sequence[Batch], norms: Sequence[ReadNorm], codes: int, check: Equivalence, world: World
) -> list[str]:
    """Move the outlier channels of norms into the weights that read them, and tell of it; nothing where the float twin
    does not know an op."""
    if not norms or check.twin is None:
        return []
    ends = channel_ends(check.twin, {norm.node: last_dimension for norm in norms}, batches, world)
    seen = [norm for norm in norms if norm.node in ends]
    counts = check.used(seen, lambda norm: _smooth(backend, norm, ends[norm.node], codes))
    moved = f"{sum(counts)} outlier channels of {sum(map(bool, counts))} norms moved into the weights that read them"
    return [moved] if any(counts) else []


def _smooth(backend: Backend, norm: ReadNorm, ends: ChannelRange, codes: int) -> int:
    """Move the outlier channels of one norm; returns their number."""
    weights = {name: backend.float_weights[name] for name in norm.readers}
    columns = torch.stack([weight.abs().amax(0) for weight in weights.values()]).amax(0)
    exponents = outlier_exponents(torch.maximum(-ends.low, ends.high), columns)
    if not bool(exponents.any()):
        return 0
    factors = torch.exp2(exponents)
    for path in norm.tensors:
        backend.rewrites.put(norm.outputs[0], path, fetch(backend.model, path).detach() / factors)
    low, high = min(0.0, float((ends.low / factors).min())), max(0.0, float((ends.high / factors).max()))
    for name in norm.outputs:
        backend.write(name, qparams_for_range(low, high, backend.sites[name], codes))
    for name, weight in weights.items():
        replace_weight(backend, name, weight * factors)
    return int((exponents > 0).sum())


def replace_weight(backend: Backend, name: str, weight: Tensor) -> None:
    """Give a layer another float weight in the place of the one that is known, and scales that are wider by as much."""
    qparams, site = backend.read(name), backend.sites[name]
    wider = _peak(weight, site) / _peak(backend.float_weights[name], site)
    backend.weights.set_float(name, weight)
    backend.write(name, QParams(qparams.scale * wider.double(), qparams.zero_point))


def _peak(weight: Tensor, site: ScaleSite) -> Tensor:
    """Largest magnitude that each scale of a weight is for; 1 where all are zero."""
    peak = weight.abs().amax() if site.axis is None else weight.abs().flatten(1).amax(1)
    return torch.where(peak > 0, peak, 1.0)
