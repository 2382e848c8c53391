"""Bias correction: what quantization takes from the mean of a channel, or adds to it, goes into the bias of its layer.

Layer after layer, on the values that the corrected layers before it give (Nagel et al., ICCV 2019, arXiv 1906.04721;
Finkelstein et al., arXiv 1906.03193).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import hooked
from cptv_ao.core.qparams import Assignment
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.cost import Cost
from cptv_ao.fx.running import call
from cptv_ao.search.proposals.following import follow
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.modules import QuantizedLayer
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer

# Forwards that an image costs: one in float, and one in which each layer runs once more when it is corrected.
_FORWARDS = 3
# Images whose means biases are for: at most, and where there is no time for the least of them, nothing is corrected.
_MEANS, _LEAST_MEANS = 200, 8


class BiasCorrector:
    """Corrects the biases of the layers whose weights are searched, as far as there is time for it.

    Args:
        twin: of the model; written: scales and corrections.
        groups: the tied groups that are searched, by the name of their leader.
        images: whose means are compared.
        cost: of a forward.
    """

    def __init__(self, twin: Twin, groups: Mapping[str, tuple[ScaleSite, ...]], images: StepImages, cost: Cost) -> None:
        self._twin, self._images = twin, images
        self._weights = [lead for lead, group in groups.items() if group[0].kind == "weight"]
        self._means = cost.images(_MEANS, forwards=_FORWARDS, share=0.02, least=0)
        #: images run through the twin so far
        self.image_forwards = 0

    @property
    def dear(self) -> bool:
        """Whether a correction takes so long that fewer images must do, as it then is with all that is proposed."""
        return self._means < _MEANS

    def worth(self, store: ScaleStore) -> bool:
        """Whether there is time for it, and a layer that may get another bias."""
        return self._means >= _LEAST_MEANS and bool(self._correctable(store))

    def in_use(self, store: ScaleStore) -> bool:
        """Whether the kernels have accepted corrected biases."""
        return any(store.read(name).correction is not None for name in self._correctable(store))

    def corrected(self, scales: Callable[[], Assignment], store: ScaleStore) -> Assignment:
        """Scales with the biases that fit them; the twin has both until it follows the model again."""
        assignment = scales()
        follow(self._twin, store)
        for name, qparams in assignment.items():
            self._twin.sites.set(name, qparams)
        found, images = corrections(self._twin, self._correctable(store), self._images.batches, self._means)
        self.image_forwards += _FORWARDS * images
        held = {name: assignment.get(name, store.read(name)) for name in found}
        return assignment | {name: replace(held[name], correction=found[name]) for name in found}

    def _correctable(self, store: ScaleStore) -> list[str]:
        return [name for name in self._weights if store.correctable(name)]


def corrections(
    twin: Twin, names: Collection[str], batches: Sequence[Batch], most: int = 200
) -> tuple[dict[str, Tensor], int]:
    """Correct the biases of layers at the scales that are in the twin.

    Args:
        twin: written: the corrections of these layers.
        names: of the weight sites whose layers may get another bias; those that run more than once do not.
        batches: search images, of which the first ones are used.
        most: images whose means are compared, about.

    Returns:
        What is to be added to each bias, float32 (C,), by weight site; and on how many images it was found.
    """
    runs = Counter(map(_site, twin.layers))
    layers = [one for one in twin.layers if _site(one) in names and runs[_site(one)] == 1]
    images = 0
    with torch.no_grad():
        for batch in batches:
            if images >= most:
                break
            images += batch.images
            _correct(twin, layers, batch, batch.images / images)
    held = {_site(layer): layer.weight.correction for layer in layers}
    return {name: found.to("cpu", copy=True) for name, found in held.items() if found is not None}, images


def _site(layer: WeightedLayer) -> str:
    return layer.weight.site.name


def _correct(twin: Twin, layers: Sequence[WeightedLayer], batch: Batch, share: float) -> None:
    """Move the corrections by a share of what the means on a batch are apart."""
    wanted: dict[WeightedLayer, Tensor] = {}

    def see(layer: Any, _: Any, output: QTensor | Tensor) -> None:
        wanted[layer] = _mean(layer, output)

    def correct(layer: Any, args: tuple[Any, ...], output: QTensor | Tensor) -> QTensor | Tensor:
        missing = (share * (wanted[layer] - _mean(layer, output))).nan_to_num_(0.0, 0.0, 0.0)
        layer.weight.add_correction(missing)
        corrected: QTensor | Tensor = layer.forward(*args)
        return corrected

    with twin.in_float(twin.names):
        _hooked(twin, layers, see, batch)
    _hooked(twin, layers, correct, batch)


def _hooked(twin: Twin, layers: Sequence[WeightedLayer], hook: Any, batch: Batch) -> None:
    with hooked([layer.register_forward_hook(hook) for layer in layers]):
        call(twin, batch)


def _mean(layer: WeightedLayer, output: QTensor | Tensor) -> Tensor:
    """Of each channel (C,), within what the output's codes can stand for, where it has some: what is beyond it, the
    function behind the layer clips in float, too (ReLU6), or nothing brings back."""
    if isinstance(output, QTensor) and isinstance(layer, QuantizedLayer):
        like = layer.output
        values = output.dequantize().clamp(
            *((end - like.zero_point) * like.scale for end in (like.site.qmin, like.site.qmax))
        )
    else:
        assert isinstance(output, Tensor)
        values = output
    return values.mean([dim for dim in range(values.dim()) if dim != layer.channel_dim % values.dim()])
