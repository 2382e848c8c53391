"""Channels moved to the middle of their ranges, where linear layers read them on one scale for all: an equivalent form
of a PT2E graph.

    Before: layer_norm(x, w, b)     -> quantize -> dequantize -> linear(., W, c)
    After:  layer_norm(x, w, b - d) -> quantize -> dequantize -> linear(., W, c + W d)

Channels that lie apart need a wide range and coarse steps; around 0 they need less, and no weight is another (the
shift of Outlier Suppression+, Wei et al., arXiv 2304.09145). What attention makes of its values is moved by their bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.fx.paths import fetch
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.channel_ranges import ChannelRange, channel_ends, last_dimension
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.pt2e_patterns import SharedInput

# A range that gets less narrow is left as it is.
_NARROWER = 0.95
# One whose channels move by a smaller share of it, too.
_STILL = 1e-3
# How near to whole numbers the numbers of channels must arrive.
_WHOLE = 0.1


def centre(
    backend: Backend, shared: Sequence[SharedInput], batches: Sequence[Batch], check: Equivalence, world: World
) -> int:
    """Move the channels of these inputs, as far as it makes their ranges narrower and nothing else reads them; returns
    how many were moved.

    Args:
        backend: of a PT2E graph, which is written: biases, and the scales of these inputs.
        shared: of it.
        batches: calibration images.
        check: of it.
        world: the ranks that all do so.
    """
    shared = [part for part in shared if all(reader.bias for reader in part.readers)]
    if not shared or check.twin is None:
        return 0
    ends = channel_ends(check.twin, {part.value: last_dimension for part in shared}, batches, world)
    worth = [part for part in shared if part.value in ends and _narrower(ends[part.value])]
    if not worth:
        return 0
    entries = _entries(check.twin, worth, check.few)
    found = [part for part in worth if part.value in entries]
    return sum(check.used(found, lambda part: _move(backend, part, ends[part.value], entries[part.value])))


def _half(ends: ChannelRange) -> float:
    """Largest distance of a value from the middle of its channel."""
    return float((ends.high - ends.low).max()) / 2


def _narrower(ends: ChannelRange) -> bool:
    """Channels that hardly vary (images that are all alike, or a single one) say nothing of their ranges."""
    return _STILL * ends.span < 2 * _half(ends) < _NARROWER * ends.span


def _entries(twin: Twin, shared: Sequence[SharedInput], few: Batch) -> dict[str, Tensor]:
    """By value, which entry of its source each channel (C,) comes from: sources give numbers of entries in the place
    of what they compute, and these arrive as they are, since the weights of attention add up to one."""
    sources, found = {part.source for part in shared}, dict[str, Tensor]()
    values = {part.value for part in shared}

    def see(node: Node, value: Any) -> Any:
        if node.name in sources and isinstance(value, Tensor):
            value = torch.arange(value.shape[-1], dtype=value.dtype, device=value.device).expand(value.shape)
        if node.name in values and (numbers := real(value)) is not None:
            rows = numbers.reshape(-1, numbers.shape[-1])
            entries = rows[0].round().long()
            if bool(((rows - entries).abs() < _WHOLE).all()) and len(set(entries.tolist())) == len(entries):
                found[node.name] = entries
        return value

    Watcher(twin.module).watch(few, see)
    return found


def _move(backend: Backend, shared: SharedInput, ends: ChannelRange, entries: Tensor) -> bool:
    """Subtract the middles from the source's bias, give them back in those of the readers, and make the scales smaller
    by as much as the range: they leave as much room, or clip as much, as before."""
    middle = (ends.low + ends.high) / 2
    bias = fetch(backend.model, shared.bias).detach().clone()
    bias[entries] -= middle.to(bias)
    backend.rewrites.put(shared.owner, shared.bias, bias)
    for reader in shared.readers:
        assert reader.bias is not None
        weight, given = backend.float_weights.get(reader.weight), fetch(backend.model, reader.bias).detach()
        weight = backend.weight(reader.weight).dequantize() if weight is None else weight
        backend.rewrites.put(reader.weight, reader.bias, given + (weight @ middle).to(given))
    for name in shared.sites:
        site = backend.sites[name]
        share = float(backend.read(name).scale) * (site.qmax - site.qmin) / ends.span
        half = _half(ends) * share
        backend.write(name, qparams_for_range(-half, half, site))
    return True
