"""Between which ends the channels of a model's values lie in float, and the scale that holds a range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import World
from cptv_ao.core.image_subsets import first_images
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.qtensor import real
from cptv_ao.simulation.twin import Twin

# Images on which values are looked at.
_IMAGES = 64


@dataclass(frozen=True)
class ChannelRange:
    """Least and greatest values, by channel (C,) each."""

    low: Tensor
    high: Tensor

    @property
    def span(self) -> float:
        """Width of the range that holds all channels, and 0."""
        return max(0.0, float(self.high.max())) - min(0.0, float(self.low.min()))


def channel_ends(twin: Twin, nodes: Sequence[str], batches: Sequence[Batch], world: World) -> dict[str, ChannelRange]:
    """Ends of what nodes of a twin give, by node, over their last dimension, as rank 0 sees them."""
    wanted, seen = set(nodes), dict[str, ChannelRange]()

    def see(node: Node, value: Any) -> Any:
        if node.name in wanted and (numbers := real(value)) is not None:
            rows = numbers.reshape(-1, numbers.shape[-1])
            low, high = rows.amin(0), rows.amax(0)
            if (known := seen.get(node.name)) is not None:
                low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
            seen[node.name] = ChannelRange(low, high)
        return value

    watcher = Watcher(twin.module)
    for batch in first_images(batches, _IMAGES):
        watcher.watch(batch, see)
    return {name: ChannelRange(world.from_first(ends.low), world.from_first(ends.high)) for name, ends in seen.items()}
