"""What the layers of a twin are given when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import hooked
from cptv_ao.fx.running import call
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer

#: by layer with a weight on a scale
LayerInputs = dict[WeightedLayer, QTensor | Tensor]


def layer_inputs(twin: Twin, batch: Batch) -> LayerInputs:
    """What each weighted layer is given when the twin runs on a batch, which is left as it is."""
    with torch.no_grad(), seeing_inputs(twin) as seen:
        call(twin, batch)
    return seen


@contextmanager
def seeing_inputs(twin: Twin) -> Iterator[LayerInputs]:
    """What each weighted layer is given (the last time, where it runs more than once) while the context lasts."""
    seen: LayerInputs = {}

    def see(layer: Any, args: tuple[Any, ...]) -> None:
        seen[layer] = args[0]

    with hooked([layer.register_forward_pre_hook(see) for layer in twin.layers]):
        yield seen
