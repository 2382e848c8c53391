"""Keys of attention moved to the middle of their ranges: an equivalent form of a lowered graph.

    softmax(q k^T) = softmax(q (k - c)^T), for q c is the same for all keys

Channels of keys lie apart (a large bias, or what all tokens have in common). They share a scale with each other, and
with queries and values where one layer gives all three; without what they have in common its steps are finer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.formatting import counted
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.attention_patterns import Keys
from cptv_ao.transforms.channel_paths import WHOLE, arriving
from cptv_ao.transforms.channel_ranges import (
    NARROWER,
    ChannelRange,
    channel_ends,
    hold_ranges,
    moving_with,
    whole_values,
)
from cptv_ao.transforms.equivalence import Equivalence
from cptv_ao.transforms.replaced_weights import add_to_bias

# How near to 1 ones arrive that nothing multiplies.
_AS_IT_IS = 1e-3


@dataclass(frozen=True)
class _Form:
    """What is subtracted from the channels of a layer that gives keys (C,), once for all attention that reads them."""

    keys: Sequence[Keys]
    middle: Tensor

    @property
    def source(self) -> str:
        return self.keys[0].source


def centre_keys(
    backend: Backend,
    keys: Sequence[Keys],
    ends: Mapping[str, ChannelRange],
    batches: Sequence[Batch],
    check: Equivalence,
    world: World,
    codes: int,
) -> list[str]:
    """Move keys to the middle of their ranges, as far as it is worth it, and tell of it.

    Args:
        backend: of a lowered model, which is written: the biases of the layers that give keys, and scales behind them.
        keys: of it.
        ends: of what their sources give.
        batches: calibration images.
        check: of it.
        world: the ranks that all do so.
        codes: steps between the ends of a range, which is to hold all that was seen.

    Returns:
        What was done, one line; nothing where the float twin does not know an op.
    """
    if not keys or check.twin is None:
        return []
    arrived = _Arrived.of(check.twin, keys, check.few.few(1))
    alike = [[one for one in keys if one.source == source] for source in dict.fromkeys(one.source for one in keys)]
    found = (_form(some, ends, arrived) for some in alike)
    done = check.used([form for form in found if form is not None], lambda form: _write(backend, form))
    if not done:
        return []
    used = [one for form in done for one in form.keys]
    moving = moving_with(backend, (name for one in used for name in one.sites.values()))
    seen = {
        node: ends[form.source].part(channels, form.middle)
        for form in done
        for one in form.keys
        for node in one.brought
        if (channels := arrived.unchanged(node)) is not None
    }
    others = [group for group in moving if not all(node in seen for site in group for node in site.nodes)]
    if others:
        seen |= channel_ends(check.twin, whole_values(others), batches, world)
    hold_ranges(backend, moving, seen, codes)
    return [f"keys of {counted(len(used), 'attention')} moved to the middle of their ranges, which no softmax sees"]


@dataclass(frozen=True)
class _Arrived:
    """What arrives at nodes, by node, where the sources of keys give the numbers of their channels, from 1 on, and
    where they give ones: what multiplies the numbers on the way."""

    numbers: Mapping[str, Tensor]
    ones: Mapping[str, Tensor]

    @staticmethod
    def of(twin: Twin, keys: Sequence[Keys], few: Batch) -> _Arrived:
        """At the products with the queries, and on scales before them."""
        sources = {one.source for one in keys}
        arrived = partial(arriving, twin, few, sources, {node for one in keys for node in (one.node, *one.brought)})
        return _Arrived(arrived(lambda count: torch.arange(1, count + 1)), arrived(torch.ones))

    def keys(self, keys: Keys) -> Tensor | None:
        """Which channels (K,) of their source keys are; None where this is something else."""
        if keys.node not in self.numbers:
            return None
        numbers = self.numbers[keys.node] / self.ones[keys.node]
        if numbers.dim() < 2:
            return None
        rows = numbers.movedim(keys.dim, -1)
        return _channels(numbers) if bool(((rows - rows[..., :1, :]).abs() < WHOLE).all()) else None

    def unchanged(self, node: str) -> Tensor | None:
        """Which channels (K,) of their source a node gives, as they are; None where this is something else."""
        if node not in self.ones or not bool(((self.ones[node] - 1).abs() < _AS_IT_IS).all()):
            return None
        return _channels(self.numbers[node])


def _channels(numbers: Tensor) -> Tensor | None:
    """The channels (K,), in order, of numbers from 1 on; None of others."""
    whole = numbers.round()
    return torch.unique(whole).long() - 1 if bool(((numbers - whole).abs() < WHOLE).all()) else None


def _form(alike: Sequence[Keys], ends: Mapping[str, ChannelRange], arrived: _Arrived) -> _Form | None:
    """Of keys that one layer gives; None where nothing is worth it."""
    channels, source = [own for one in alike if (own := arrived.keys(one)) is not None], alike[0].source
    if len(channels) < len(alike) or source not in ends:
        return None
    middle = _middle(ends[source], torch.cat(channels))
    return None if middle is None else _Form(alike, middle)


def _middle(ends: ChannelRange, channels: Tensor) -> Tensor | None:
    """Of these channels, 0 of the others (C,); None where the range of all does not get narrower by it."""
    middle = torch.zeros_like(ends.low)
    if not 0 <= int(channels.min()) <= int(channels.max()) < len(middle):
        return None
    middle[channels] = ((ends.low + ends.high) / 2)[channels]
    span = float((ends.high - middle).max().clamp_min(0.0) - (ends.low - middle).min().clamp_max(0.0))
    return middle if span < NARROWER * ends.span else None


def _write(backend: Backend, form: _Form) -> _Form:
    """Give the layer its other bias."""
    add_to_bias(backend, form.keys[0].weight, -form.middle)
    return form
