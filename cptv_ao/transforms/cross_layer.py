"""Channels that lie on one scale brought to like ranges, from layer to layer (cross-layer equalization: Nagel et al.,
arXiv 1906.04721; Meller et al., arXiv 1902.01917).

    Before: conv (w, b) -> relu -> conv (v)
    After:  conv (s w, s b) -> relu -> conv (v / s)

Scales of weights are per channel of what a layer gives, so the factors s cost the first one no code; in the second they
stand beside each other in one row, except where each row has one channel (depthwise). The factors are those of a few
families whose roundings are the least, as far as these are predicted: of the values, seen by the weights that read
them, and of these weights, seen by the values. All are powers of two, which no float is rounded by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.image_subsets import first_images
from cptv_ao.core.qparams import QParams, qparams_for_range
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.bn_folding import scale_channels
from cptv_ao.transforms.channel_groups import ChannelGroup, Output, columns_of
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.smooth_quant import _peak

# Images on which values are looked at.
_IMAGES = 64
# Powers of the ranges of values and of columns of weights that factors are made of.
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# How far below the end that a ReLU6 clips channels stay that did not reach it.
_ROOM = 2.0
# Powers of two that a factor is, at most.
_FURTHEST = 3.0
# What is predicted to be left of the roundings, at most, for it to be worth it.
_WORTH = 0.75


@dataclass(frozen=True)
class _Channels:
    """Least and greatest values, and mean squares, by channel (C,) each."""

    low: Tensor
    high: Tensor
    square: Tensor


@dataclass(frozen=True)
class _Columns:
    """What a reader makes of the channels of what it reads.

    Attributes:
        channel: of each column of each row (O, K).
        square: of its weights (O, K), summed over a kernel.
        largest: of them (O, K).
        kernel: weights that a column has.
        values: mean squares of what it reads (C,).
        steps: half of the codes of a row.
    """

    channel: Tensor
    square: Tensor
    largest: Tensor
    kernel: int
    values: Tensor
    steps: float


def equalizable(backend: Backend, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Those whose readers' weights need not be rounded anew, or can be and lose nothing by it."""
    known = backend.float_weights.keys()

    def writable(name: str) -> bool:
        rounded = name in known and not backend.sites[name].is_coarse
        return backend.weights.shiftable(name) and (rounded or backend.weight(name).shape[1] == 1)

    return [
        group
        for group in groups
        if all(writable(name) for name, _ in group.readers) and all(map(backend.weights.shiftable, group.writers))
    ]


def equalized(
    backend: Backend,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Batch],
    codes: int,
    check: Equivalence,
    world: World,
) -> list[str]:
    """Equalize the channels of groups, as far as that is worth it, and tell of it; nothing where the float twin does
    not know an op.

    Args:
        codes: steps between the ends of an activation that observers calibrated for.
    """
    if not groups or check.twin is None:
        return []
    seen = _channels(check.twin, groups, batches, world)
    counts = check.used(groups, lambda group: _equalize(backend, group, seen, codes))
    told = (
        f"{sum(counts)} channels of {sum(map(bool, counts))} layers brought to like ranges with the layers behind them"
    )
    return [told] if any(counts) else []


def _channels(
    twin: Twin, groups: Sequence[ChannelGroup], batches: Sequence[Batch], world: World
) -> dict[str, _Channels]:
    """Of all values of these groups that have a site or are read by a layer, by node, as rank 0 sees them."""
    wanted = {output.node: group for group in groups for output in group.outputs}
    wanted |= {node: group for group in groups for _, node in group.readers}
    seen, batches = dict[str, _Channels](), first_images(batches, _IMAGES)
    share = 1 / sum(batch.images for batch in batches)

    def see(node: Node, value: Any, weight: float) -> Any:
        if node.name in wanted and (numbers := real(value)) is not None:
            rows = _by_channel(numbers, wanted[node.name])
            low, high, square = rows.amin(1), rows.amax(1), rows.square().mean(1) * weight
            if (known := seen.get(node.name)) is not None:
                low, high, square = (
                    torch.minimum(low, known.low),
                    torch.maximum(high, known.high),
                    square + known.square,
                )
            seen[node.name] = _Channels(low, high, square)
        return value

    watcher = Watcher(twin.module)
    for batch in batches:
        watcher.watch(batch, partial(see, weight=share * batch.images))
    return {name: _Channels(*map(world.from_first, (one.low, one.high, one.square))) for name, one in seen.items()}


def _by_channel(values: Tensor, group: ChannelGroup) -> Tensor:
    """(C, N), of values that may be flattened behind dimension 1."""
    if group.dim == 1:
        values = values.reshape(len(values), group.count, -1)
    return values.movedim(group.dim, 0).flatten(1)


def _equalize(backend: Backend, group: ChannelGroup, seen: Mapping[str, _Channels], codes: int) -> int:
    """Scale the channels of one group; returns how many."""
    ends = [_clipped(seen[output.node], output) for output in group.outputs]
    readers = [_columns(backend, name, seen[node]) for name, node in group.readers]
    exponents = _exponents(ends, readers, _room(group, seen), codes)
    if exponents is None:
        return 0
    factors = torch.exp2(exponents)
    for name in group.writers:
        bias = backend.weights.biases.given(name)
        scale_channels(backend, name, factors, None if bias is None else bias * factors)
    for name, _ in group.readers:
        _divide(backend, name, factors)
    for output, one in zip(group.outputs, ends, strict=True):
        low, high = min(0.0, float((one.low * factors).min())), max(0.0, float((one.high * factors).max()))
        for name in output.sites:
            backend.write(name, qparams_for_range(low, high, backend.sites[name], codes))
    return int((exponents != 0).sum())


def _clipped(ends: _Channels, output: Output) -> _Channels:
    """What is let through of values."""
    low, high = (part.clamp(output.low, output.high) for part in (ends.low, ends.high))
    return _Channels(low, high, ends.square)


def _room(group: ChannelGroup, seen: Mapping[str, _Channels]) -> tuple[Tensor, Tensor]:
    """The least and the greatest exponent of each channel: what a ReLU6 lets through must stay what it is."""
    least, most = torch.tensor(-_FURTHEST), torch.tensor(_FURTHEST)
    for output in group.outputs:
        if not math.isinf(output.high):
            reached = seen[output.node].high.clamp_min(output.high / 2**_FURTHEST)
            free = torch.log2(output.high / (_ROOM * reached)).floor()
            least, most = torch.tensor(0.0), torch.minimum(most, free.clamp_min(0.0))
    return least, most


def _columns(backend: Backend, name: str, read: _Channels) -> _Columns:
    """Of one reader."""
    weight = backend.float_weights.get(name)
    weight = backend.weight(name).dequantize() if weight is None else weight
    kernels, site = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2), backend.sites[name]
    channel = columns_of(len(read.square), tuple(weight.shape))
    assert channel is not None
    half = (site.qmax - site.qmin) / 2
    return _Columns(
        channel, kernels.square().sum(2), kernels.abs().amax(2), kernels.shape[2], read.square[channel], half
    )


def _exponents(
    ends: Sequence[_Channels], readers: Sequence[_Columns], room: tuple[Tensor, Tensor], codes: int
) -> Tensor | None:
    """Of the factors (C,) that leave least of the roundings; None where none are worth it."""
    peaks = torch.stack([torch.maximum(-one.low, one.high) for one in ends]).amax(0)
    weighed = torch.stack([_largest(reader, len(peaks)) for reader in readers]).amax(0)
    of_values, of_weights = (_beside_largest(part) for part in (peaks, weighed))
    none = torch.zeros_like(peaks)
    tried = [
        (by_weights * of_weights - by_values * of_values).round().clamp(*room)
        for by_values, by_weights in product(_POWERS, _POWERS)
    ]
    best = min(tried, key=lambda exponents: _noise(ends, readers, torch.exp2(exponents), codes))
    left, given = (_noise(ends, readers, torch.exp2(exponents), codes) for exponents in (best, none))
    return best if left < _WORTH * given else None


def _beside_largest(part: Tensor) -> Tensor:
    """Powers of two; of channels that have nothing, none."""
    return torch.where(part > 0, torch.log2(part / part.max()), 0.0)


def _largest(reader: _Columns, channels: int) -> Tensor:
    """Largest weight of each channel (C,), beside the largest of all."""
    found = torch.zeros(channels).scatter_reduce(0, reader.channel.flatten(), reader.largest.flatten(), "amax")
    return found / found.max().clamp_min(torch.finfo(found.dtype).tiny)


def _noise(ends: Sequence[_Channels], readers: Sequence[_Columns], factors: Tensor, codes: int) -> float:
    """Mean square of what roundings do to the products of the readers, beside that of these."""
    spans = [float((one.high * factors).max().clamp_min(0) - (one.low * factors).min().clamp_max(0)) for one in ends]
    values, found = sum((span / codes) ** 2 for span in spans) / 12, 0.0
    for reader in readers:
        factor = factors[reader.channel]
        of_values = values * (reader.square / factor**2).sum()
        steps = (reader.largest / factor).amax(1, keepdim=True) / reader.steps
        of_weights = (steps**2 / 12 * reader.kernel * reader.values * factor**2).sum()
        found += float((of_values + of_weights) / (reader.square * reader.values).sum().clamp_min(1e-30))
    return found


def _divide(backend: Backend, name: str, factors: Tensor) -> None:
    """Take the factors of what a reader reads out of its weight."""
    shape, bias = tuple(backend.weight(name).shape), backend.weights.biases.given(name)
    channel = columns_of(len(factors), shape)
    assert channel is not None
    if shape[1] == 1:  # each row has one factor, which its scale takes
        scale_channels(backend, name, 1 / factors[channel[:, 0]], bias)
        return
    weight, site, qparams = backend.float_weights[name], backend.sites[name], backend.read(name)
    divided = weight / factors[channel].reshape(*channel.shape, *[1] * (len(shape) - 2))
    wider = _peak(divided, site) / _peak(weight, site)
    backend.weights.set_float(name, divided)
    backend.write(name, QParams(qparams.scale * wider.double(), qparams.zero_point))
