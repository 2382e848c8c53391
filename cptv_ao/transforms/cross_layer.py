"""Channels that lie on one scale brought to like ranges, from layer to layer (cross-layer equalization: Nagel et al.,
arXiv 1906.04721; Meller et al., arXiv 1902.01917).

    Before: conv (w, b) -> relu -> conv (v)
    After:  conv (s w, s b) -> relu -> conv (v / s)

Scales of weights are per channel of what a layer gives, so the factors s cost the first one no code; in the second they
stand beside each other in one row, except where each row has one channel (depthwise). What they are is chosen in
`cptv_ao.transforms.equalization_factors`; powers of two, which no float is rounded by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.formatting import counted
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.transforms.bn_folding import scale_channels
from cptv_ao.transforms.channel_groups import ChannelGroup, Output, columns_of
from cptv_ao.transforms.channel_ranges import ChannelRange, channel_ends
from cptv_ao.transforms.equalization_factors import ReaderColumns, factor_exponents
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.replaced_weights import replace_weight

# How far below the end that a ReLU6 clips channels stay that did not reach it.
_ROOM = 2.0
# Powers of two that a factor is, at most.
_FURTHEST = 3.0


def equalizable(backend: Backend, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Those whose readers' weights need not be rounded anew, or can be and lose nothing by it."""
    known = backend.float_weights.keys()

    def writable(name: str) -> bool:
        rounded = name in known and not backend.sites[name].is_coarse
        return backend.weights.shiftable(name) and (rounded or _has_a_scale_each(backend, name))

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
    wanted = {node: partial(_by_channel, group=group) for group in groups for node in _nodes(group)}
    seen = channel_ends(check.twin, wanted, batches, world)
    fitting = [group for group in groups if all(node in seen for node in _nodes(group))]
    counts = check.used(fitting, lambda group: _equalize(backend, group, seen, codes))
    told = f"{counted(sum(counts), 'channel')} of {counted(sum(map(bool, counts)), 'layer')}"
    return [f"{told} brought to like ranges with the layers behind them"] if any(counts) else []


def _nodes(group: ChannelGroup) -> list[str]:
    """What is put on a scale, and what is read by a layer."""
    return [*(output.node for output in group.outputs), *(node for _, node in group.readers)]


def _by_channel(values: Tensor, group: ChannelGroup) -> Tensor | None:
    """(C, N), of values that may be flattened behind dimension 1; None of others."""
    if values.dim() < 2 or not values.numel():
        return None
    if group.dim == 1 and values.shape[1] % group.count == 0:
        values = values.reshape(len(values), group.count, -1)
    return values.movedim(group.dim, 0).flatten(1) if values.shape[group.dim] == group.count else None


def _equalize(backend: Backend, group: ChannelGroup, seen: Mapping[str, ChannelRange], codes: int) -> int:
    """Scale the channels of one group; returns how many."""
    ends = [_clipped(seen[output.node], output) for output in group.outputs]
    readers = [_columns(backend, name, seen[node]) for name, node in group.readers]
    exponents = factor_exponents(ends, readers, _room(group, seen), codes)
    if exponents is None:
        return 0
    factors = torch.exp2(exponents)
    for name in group.writers:
        bias = backend.weights.biases.given(name)
        scale_channels(backend, name, factors, None if bias is None else bias * factors)
    for name, _ in group.readers:
        _divide(backend, name, factors)
    for output, one in zip(group.outputs, ends, strict=True):
        low, high = one.times(factors).bounds
        for name in output.sites:
            backend.write(name, qparams_for_range(low, high, backend.sites[name], codes))
    return int((exponents != 0).sum())


def _clipped(ends: ChannelRange, output: Output) -> ChannelRange:
    """What is let through of values."""
    low, high = (part.clamp(output.low, output.high) for part in (ends.low, ends.high))
    return replace(ends, low=low, high=high)


def _room(group: ChannelGroup, seen: Mapping[str, ChannelRange]) -> tuple[Tensor, Tensor]:
    """The least and the greatest exponent of each channel: what a ReLU6 lets through must stay what it is."""
    least, most = torch.tensor(-_FURTHEST), torch.tensor(_FURTHEST)
    for output in group.outputs:
        if not math.isinf(output.high):
            reached = seen[output.node].high.clamp_min(output.high / 2**_FURTHEST)
            free = torch.log2(output.high / (_ROOM * reached)).floor()
            least, most = torch.tensor(0.0), torch.minimum(most, free.clamp_min(0.0))
    return least, most


def _columns(backend: Backend, name: str, read: ChannelRange) -> ReaderColumns:
    """Of one reader."""
    weight = backend.float_weights.get(name)
    weight = backend.weight(name).dequantize() if weight is None else weight
    kernels, site = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2), backend.sites[name]
    channel = columns_of(len(read.square), tuple(weight.shape))
    assert channel is not None
    half, alone = (site.qmax - site.qmin) / 2, site.axis == 0
    square, largest = kernels.square().sum(2), kernels.abs().amax(2)
    return ReaderColumns(channel, square, largest, kernels.shape[2], read.square[channel], half, alone)


def _has_a_scale_each(backend: Backend, name: str) -> bool:
    """Whether each row of a weight has one channel, whose factor its scale takes (depthwise)."""
    return backend.sites[name].axis == 0 and backend.weight(name).shape[1] == 1


def _divide(backend: Backend, name: str, factors: Tensor) -> None:
    """Take the factors of what a reader reads out of its weight."""
    shape, bias = tuple(backend.weight(name).shape), backend.weights.biases.given(name)
    channel = columns_of(len(factors), shape)
    assert channel is not None
    if _has_a_scale_each(backend, name):
        scale_channels(backend, name, 1 / factors[channel[:, 0]], bias)
        return
    divisors = factors[channel].reshape(*channel.shape, *[1] * (len(shape) - 2))
    replace_weight(backend, name, backend.float_weights[name] / divisors)
