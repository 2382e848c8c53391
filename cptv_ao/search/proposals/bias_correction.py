"""Bias correction: what quantization takes from the mean of a channel, or adds to it, goes into the bias of its layer.

Layer after layer, on the values that the corrected layers before it give (Nagel et al., ICCV 2019, arXiv 1906.04721;
Finkelstein et al., arXiv 1906.03193). What a few places are off by far (a token of outliers that is clipped) is not
made up for at all the others: errors count up to so many times the usual one.
"""

from __future__ import annotations

import math
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
# So many times the mean size of a channel's errors one of them counts at most. Numbers that are held of all layers, and
# places of each at least.
_FAR, _HELD, _LEAST_PLACES = 6.0, 2**26, 64
# Images that say in which steps biases are learnt, at most, and the least such step.
_UNITS, _LEAST_UNIT = 16, 1e-8


class BiasCorrector:
    """Corrects the biases of the layers whose weights are searched, as far as there is time for it.

    Args:
        twin: of the model; written: scales and corrections.
        groups: the tied groups that are searched, by the name of their leader.
        images: whose means are compared.
        cost: of a forward.
    """

    def __init__(self, twin: Twin, groups: Mapping[str, tuple[ScaleSite, ...]], images: StepImages, cost: Cost) -> None:
        self._twin, self._images, self._cost = twin, images, cost
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

    def units(self, store: ScaleStore) -> dict[str, Tensor]:
        """By weight site of the layers that may get another bias: how far their outputs are from those in float, root
        mean square of each channel (C,). In steps of that a descent moves biases."""
        layers = self._twin.layers_alone(self._correctable(store))
        batch = self._images.batches[0].few(self._cost.images(_UNITS, forwards=2, share=0.005, least=2))
        found: dict[str, Tensor] = {}

        def compare(layer: WeightedLayer, errors: Tensor) -> None:
            found[_site(layer)] = errors.square().mean(0).sqrt().nan_to_num_(0.0, 0.0, 0.0).clamp_min_(_LEAST_UNIT)

        if layers:
            self.image_forwards += 2 * batch.images
            with torch.no_grad():
                _with_errors(self._twin, layers, batch, compare)
        return found

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
    layers, images = twin.layers_alone(names), 0
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

    def correct(layer: WeightedLayer, errors: Tensor) -> bool:
        layer.weight.add_correction((share * _usual(errors)).nan_to_num_(0.0, 0.0, 0.0))
        return True

    _with_errors(twin, layers, batch, correct)


def _with_errors(
    twin: Twin, layers: Sequence[WeightedLayer], batch: Batch, use: Callable[[WeightedLayer, Tensor], bool | None]
) -> None:
    """Run a batch in float and as it is; `use` is given each layer with what its output lacks at some places (n, C),
    and says whether the layer is to run again with what it was given."""
    wanted: dict[WeightedLayer, Tensor] = {}
    most = _HELD // max(1, sum(len(layer.weight.codes) for layer in layers))

    def see(layer: Any, _: Any, output: QTensor | Tensor) -> None:
        wanted[layer] = _places(layer, output, most)

    def compare(layer: Any, args: tuple[Any, ...], output: QTensor | Tensor) -> QTensor | Tensor:
        again = use(layer, wanted.pop(layer).sub_(_places(layer, output, most)))
        found: QTensor | Tensor = layer.forward(*args) if again else output
        return found

    with twin.in_float(twin.names):
        _hooked(twin, layers, see, batch)
    _hooked(twin, layers, compare, batch)


def _hooked(twin: Twin, layers: Sequence[WeightedLayer], hook: Any, batch: Batch) -> None:
    with hooked([layer.register_forward_hook(hook) for layer in layers]):
        call(twin, batch)


def _places(layer: WeightedLayer, output: QTensor | Tensor, most: int) -> Tensor:
    """What is found at some places of each channel (n, C), within what the output's codes can stand for, where it has
    some: what is beyond it, the function behind the layer clips in float, too (ReLU6), or nothing brings back."""
    values = output.codes if isinstance(output, QTensor) else output
    rows = values.movedim(layer.channel_dim, -1).reshape(-1, values.shape[layer.channel_dim])
    rows = rows[:: max(1, math.ceil(len(rows) / max(most, _LEAST_PLACES)))].clone()
    if isinstance(output, QTensor):
        assert isinstance(layer, QuantizedLayer)
        like = layer.output
        ends = ((end - like.zero_point) * like.scale for end in (like.site.qmin, like.site.qmax))
        rows = rows.mul_(output.scale).clamp_(*ends)
    return rows


def _usual(errors: Tensor) -> Tensor:
    """The mean error of each channel (C,), of errors (n, C), where none counts more than `_FAR` times the mean size of
    those that are there: zeros are what a ReLU has cut off on both sides."""
    size = errors.abs().sum(0) / (errors != 0).sum(0).clamp_min(1)
    return errors.clamp(-_FAR * size, _FAR * size).mean(0)
