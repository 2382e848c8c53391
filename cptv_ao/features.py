"""What the layers are given in the float network, and how far what they are given is from it.

The outputs alone say little about millions of roundings: a descent that follows nothing else learns the calibration
images by heart. The inputs of the layers say more about each image (FitNets, Romero et al., ICLR 2015; BRECQ, Li et
al., ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.data import Batch
from cptv_ao.twin import LayerInputs, Twin
from cptv_ao.twin.exported import FloatWeighted
from cptv_ao.twin.modules import Weighted
from cptv_ao.twin.values import Apart, QTensor, dot


@dataclass(frozen=True, eq=False)
class Target:
    """What a layer is given in float, codes times scale, and |codes * scale|^2."""

    codes: Tensor
    scale: Tensor
    signal: float


#: by layer; without those whose input says nothing: all zero, or infinite padding
Targets = dict[Weighted | FloatWeighted, Target]


class Features:
    """The layer inputs in float, asked once per part of a batch as long as they fit into a cache.

    Args:
        twin: whose float mode is asked.
        cache_bytes: what is kept of the layer inputs at most.
    """

    def __init__(self, twin: Twin, cache_bytes: int) -> None:
        self._twin, self._left = twin, cache_bytes
        # In float, too, values are held in steps: always the same ones, so that it does not show what was kept.
        self._steps = {name: {"scale": twin.get(name).scale.float().to(twin.device)} for name in twin.names}
        self._kept: dict[tuple[int, int], Targets] = {}
        #: images that the twin ran in float
        self.image_forwards = 0

    def wanted(self, key: tuple[int, int], part: Batch) -> Targets:
        """The layer inputs in float on a part of a batch, which the key names."""
        if key in self._kept:
            return self._kept[key]
        with torch.no_grad(), self._twin.in_float(self._twin.names), self._twin.seeing_inputs() as inputs:
            self._twin.call(self._steps, *part.args, **part.kwargs)
        self.image_forwards += part.images
        targets = {layer: _target(*_scaled(value)) for layer, value in inputs.items()}
        targets = {layer: target for layer, target in targets.items() if 0 < target.signal < math.inf}
        size = sum(target.codes.numel() * target.codes.element_size() for target in targets.values())
        if size <= self._left:
            self._left -= size
            self._kept[key] = targets
        return targets


def distance(found: LayerInputs, wanted: Targets) -> Tensor:
    """Noise to signal of the layer inputs, |found - wanted|^2 / |wanted|^2: mean over the layers (), differentiable."""
    ratios = [
        Apart.apply(*_scaled(found[layer]), target.codes, target.scale) / target.signal
        for layer, target in wanted.items()
    ]
    return torch.stack(ratios).mean() if ratios else torch.zeros(())


def _target(codes: Tensor, scale: Tensor) -> Target:
    return Target(codes, scale, float(dot(codes, codes) * scale.square()))


def _scaled(value: QTensor | Tensor) -> tuple[Tensor, Tensor]:
    """What times what gives the values."""
    return (value, value.new_ones(())) if isinstance(value, Tensor) else (value.codes, value.scale)
