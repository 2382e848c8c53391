"""Between which ends the channels of a model's values lie in float, and the scale that holds a range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.image_subsets import first_images
from cptv_ao.core.qparams import qparams_for_range
from cptv_ao.core.sites import ScaleSite
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.twin import Twin

#: A range that gets less narrow is left as it is.
NARROWER = 0.95
# Images on which values are looked at, and how many values of each channel are kept.
_IMAGES, _KEPT = 64, 128
# So many values of a channel reach its ends; of fewer (one an image behind a pool) so many standard deviations do.
_ENOUGH, _FAR = 64, 3.0


#: Gives the values of a node by channel, (C, N); None where they have none.
ByChannel = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class ChannelRange:
    """Least and greatest values, and mean squares, by channel (C,) each; and some of the values (C, N)."""

    low: Tensor
    high: Tensor
    square: Tensor
    some: Tensor

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the range that holds all channels, and 0."""
        return min(0.0, float(self.low.min())), max(0.0, float(self.high.max()))

    @property
    def span(self) -> float:
        """Width of that range."""
        low, high = self.bounds
        return high - low

    def times(self, factors: Tensor) -> ChannelRange:
        """Of channels that are multiplied by positive factors (C,)."""
        low, high, some = self.low * factors, self.high * factors, self.some * factors[:, None]
        return ChannelRange(low, high, self.square * factors.square(), some)

    def part(self, channels: Tensor, middle: Tensor) -> ChannelRange:
        """Of some of the channels, (K,) of their numbers, of which the middle (C,) was subtracted."""
        low, high, some = self.low - middle, self.high - middle, self.some - middle[:, None]
        return ChannelRange(low[channels], high[channels], some[channels].square().mean(1), some[channels])

    @property
    def reached(self) -> ChannelRange:
        """With ends as they are of more values, where these are few; none gets beyond 0 that was not."""
        if not 1 < self.some.shape[1] < _ENOUGH:
            return self
        mean, far = self.some.mean(1), _FAR * self.some.std(1)
        low, high = torch.minimum(self.low, mean - far), torch.maximum(self.high, mean + far)
        low = torch.where(self.low < 0, low, low.clamp_min(0.0))
        return replace(self, low=low, high=torch.where(self.high > 0, high, high.clamp_max(0.0)))


def last_dimension(values: Tensor) -> Tensor:
    """Values by channel, where these are the last dimension."""
    return values.reshape(-1, values.shape[-1]).T


def channel_ends(
    twin: Twin, wanted: Mapping[str, ByChannel], batches: Sequence[Batch], world: World
) -> dict[str, ChannelRange]:
    """Of what nodes of a twin give, by node, as rank 0 sees them, and as far as more of it reaches; without those that
    have no channels."""
    seen, batches = dict[str, ChannelRange](), first_images(batches, _IMAGES)
    images = sum(batch.images for batch in batches)

    def see(node: Node, value: Any, share: float) -> Any:
        if node.name in wanted and (numbers := real(value)) is not None:
            rows = wanted[node.name](numbers)
            if rows is not None:
                low, high, square = rows.amin(1), rows.amax(1), rows.square().mean(1) * share
                some = rows[:, spread(rows.shape[1], math.ceil(share * _KEPT))]
                if (known := seen.get(node.name)) is not None:
                    low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
                    square, some = square + known.square, torch.cat([known.some, some], 1)
                seen[node.name] = ChannelRange(low, high, square, some)
        return value

    watcher = Watcher(twin.module)
    for batch in batches:
        watcher.watch(batch, partial(see, share=batch.images / images))
    some = world.share([one.some if world.rank == 0 else None for one in seen.values()])
    return {
        name: ChannelRange(*_of_first(world, one), kept).reached
        for (name, one), kept in zip(seen.items(), some, strict=True)
    }


def moving_with(backend: Backend, names: Iterable[str]) -> list[tuple[ScaleSite, ...]]:
    """The groups of sites that some activations move with."""
    groups = backend.sites.groups()
    leads = dict.fromkeys(backend.sites[name].tied for name in names)
    return [groups[lead] for lead in leads if lead in groups]


def whole_values(moving: Sequence[Sequence[ScaleSite]]) -> dict[str, ByChannel]:
    """Asks `channel_ends` for the nodes of groups of sites, all values as one channel."""
    return {node: _one_channel for group in moving for site in group for node in site.nodes}


def hold_ranges(
    backend: Backend, moving: Sequence[Sequence[ScaleSite]], seen: Mapping[str, ChannelRange], codes: int
) -> None:
    """Give groups of activations scales that hold all that was seen of them.

    Args:
        seen: of their nodes, in float.
        codes: steps between the ends of a range.
    """
    for group in moving:
        bounds = [seen[node].bounds for site in group for node in site.nodes if node in seen]
        low, high = min((one[0] for one in bounds), default=0.0), max((one[1] for one in bounds), default=0.0)
        for site in group if high > low else ():
            backend.write(site.name, qparams_for_range(low, high, site, codes))


def _of_first(world: World, one: ChannelRange) -> tuple[Tensor, Tensor, Tensor]:
    return world.from_first(one.low), world.from_first(one.high), world.from_first(one.square)


def _one_channel(values: Tensor) -> Tensor:
    return values.reshape(1, -1)


def spread(count: int, most: int) -> Tensor:
    """Which of so many places are kept."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float32).long()
