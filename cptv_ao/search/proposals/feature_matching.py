"""What the layers are given in the float network, and how far what they are given is from it.

The outputs alone say little about millions of roundings: a descent that follows nothing else learns the calibration
images by heart. The inputs of the layers say more about each image (FitNets, Romero et al., ICLR 2015; BRECQ, Li et
al., ICLR 2021).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.channel_scaling import OUTLIER
from cptv_ao.core.precision import cpu_products_in_bfloat16
from cptv_ao.core.tensors import Select, compared
from cptv_ao.fx.running import own_inputs
from cptv_ao.simulation.layer_inputs import LayerInputs, seeing_inputs
from cptv_ao.simulation.qtensor import Apart, QTensor
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer


@dataclass(frozen=True, eq=False)
class Target:
    """What a layer is given in float, codes times scale, and what a squared error counts, by channel."""

    codes: Tensor
    scale: Tensor
    weight: Tensor


#: by layer; without those whose input says nothing: all zero, or infinite padding
Targets = dict[WeightedLayer, Target]


class LayerInputTargets:
    """The layer inputs in float, asked once per part of a batch as long as they fit into a cache; where those of less
    than half of the images do, each time, for few would be asked for again.

    Args:
        twin: whose float mode is asked.
        cache_bytes: what is kept of the layer inputs at most.
        coarse: whether bfloat16 is exact enough for them on a CPU.

    Attributes:
        images: of all batches.
    """

    def __init__(self, twin: Twin, cache_bytes: int, coarse: bool = False) -> None:
        self._twin, self._cache_bytes, self._left, self._coarse = twin, cache_bytes, cache_bytes, coarse
        #: In float, too, values are held in steps: always the same ones, so that it does not show what was kept.
        self.steps = {name: {"scale": twin.sites.modules[name].scale.clone()} for name in twin.names}
        self._kept: dict[tuple[int, int], Targets] = {}
        self._asked: tuple[Batch | None, Targets] = None, {}
        self.images = 0
        #: images that the twin ran in float
        self.image_forwards = 0

    def forget(self) -> None:
        """Keep nothing of what was asked so far: parts are cut in another way from now on."""
        self._kept.clear()
        self._left = self._cache_bytes

    def wanted(self, key: tuple[int, int], part: Batch) -> Targets:
        """The layer inputs in float on a part of a batch, which the key names."""
        if key in self._kept:
            return self._kept[key]
        batch, targets = self._asked
        if batch is not part:
            targets, _ = self._run(part)
        self._asked = None, {}
        size = sum(target.codes.numel() * target.codes.element_size() for target in targets.values())
        if size <= self._left and size * self.images <= 2 * self._cache_bytes * part.images:
            self._left -= size
            self._kept[key] = targets
        return targets

    def outputs(self, select: Select, batch: Batch) -> Tensor:
        """What the network gives for a batch in float (N, C): a teacher that takes no other pass than the layer inputs
        take, if these are asked for next."""
        targets, output = self._run(batch)
        self._asked = batch, targets
        return compared(output, select)

    def _run(self, part: Batch) -> tuple[Targets, Any]:
        """The layer inputs in float, and what the network returns."""
        args, kwargs = own_inputs(part)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._twin.in_float(self._twin.names))
            inputs = stack.enter_context(seeing_inputs(self._twin))
            if self._coarse:
                stack.enter_context(cpu_products_in_bfloat16())
                stack.enter_context(self._twin.attention())
            output = self._twin.call(self.steps, *args, **kwargs)
        self.image_forwards += part.images
        found = {layer: _target(*_scaled(value), layer.channel_dim) for layer, value in inputs.items()}
        says = torch.stack([says for _, says in found.values()]).tolist() if found else []  # one read of all of them
        return {layer: target for (layer, (target, _)), own in zip(found.items(), says, strict=True) if own}, output


def distance(found: LayerInputs, wanted: Targets) -> Tensor:
    """Noise to signal of the layer inputs: mean over the layers (), differentiable.

    Of each layer |found - wanted|^2 / |wanted|^2, where channels of outliers (over `OUTLIER` times as large as the
    median channel) count as if they were just not: they would else be all that counts.
    """
    ratios = [
        Apart.apply(*_scaled(found[layer]), target.codes, target.scale, target.weight)
        for layer, target in wanted.items()
    ]
    return torch.stack(ratios).mean() if ratios else torch.zeros(())


def _target(codes: Tensor, scale: Tensor, channel_dim: int) -> tuple[Target, Tensor]:
    """Of a layer, and whether it says anything (). On a GPU half of the bits are kept."""
    shape = [1] * codes.dim()
    shape[channel_dim] = -1
    others = [d for d in range(codes.dim()) if shape[d] == 1]
    signal = codes.square().mean(others) * scale.square()
    usual = OUTLIER**2 * signal.median()
    capped = torch.where(usual > 0, torch.minimum(signal, usual), signal)
    counts = torch.where(signal > 0, capped / signal, 1.0)
    weight = (counts / (capped.mean() * codes.numel())).reshape(shape)
    says = (capped.sum() > 0) & signal.sum().isfinite()
    return Target(codes.bfloat16() if codes.is_cuda else codes, scale, weight), says


def _scaled(value: QTensor | Tensor) -> tuple[Tensor, Tensor]:
    """What times what gives the values."""
    return (value, value.new_ones(())) if isinstance(value, Tensor) else (value.codes, value.scale)
