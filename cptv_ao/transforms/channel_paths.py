"""Where in a model's values the channels of others arrive: found by what arrives where these are numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor
from torch.fx import Node

from cptv_ao.core.batches import Batch
from cptv_ao.fx.node_runner import Watcher
from cptv_ao.simulation.qtensor import QTensor, real
from cptv_ao.simulation.twin import Twin

#: How near to whole numbers the numbers of channels must arrive.
WHOLE = 0.1


def arriving(
    twin: Twin, few: Batch, sources: Collection[str], places: Collection[str], numbers: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """What arrives at nodes (of names `places`), by node, where others give numbers in the place of what they compute.

    Args:
        twin: in float.
        few: images that it runs on.
        sources: names of the nodes that give numbers.
        numbers: of so many channels (C,), which are the last dimension.
    """
    seen: dict[str, Tensor] = {}

    def see(node: Node, value: Any) -> Any:
        if node.name in sources and (given := real(value)) is not None:
            put = numbers(given.shape[-1]).to(given).expand(given.shape)
            value = value.with_codes(put / value.scale) if isinstance(value, QTensor) else put
        if node.name in places and (given := real(value)) is not None:
            seen[node.name] = given
        return value

    Watcher(twin.module).watch(few, see)
    return seen
