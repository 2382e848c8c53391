"""Bias correction: what quantization takes from the mean of a channel, or adds to it, goes into the bias of its layer.

Layer after layer, on the values that the corrected layers before it give (Nagel et al., ICCV 2019, arXiv 1906.04721;
Finkelstein et al., arXiv 1906.03193).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.fx.running import call
from cptv_ao.simulation.modules import QuantizedLayer
from cptv_ao.simulation.pt2e_builder import FloatLayer
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin

#: Forwards that an image costs: one in float, and one in which each layer runs once more when it is corrected.
FORWARDS = 3


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
    layers = [
        one for one in twin.layers if isinstance(one, QuantizedLayer) and _site(one) in names and runs[_site(one)] == 1
    ]
    images = 0
    with torch.no_grad():
        for batch in batches:
            if images >= most:
                break
            images += batch.images
            _correct(twin, layers, batch, batch.images / images)
    held = {_site(layer): layer.weight.correction for layer in layers}
    return {name: correction.cpu() for name, correction in held.items() if correction is not None}, images


def _site(layer: QuantizedLayer | FloatLayer) -> str:
    return layer.weight.site.name


def _correct(twin: Twin, layers: Sequence[QuantizedLayer], batch: Batch, share: float) -> None:
    """Move the corrections by a share of what the means on a batch are apart."""
    wanted: dict[QuantizedLayer, Tensor] = {}

    def see(layer: Any, _: Any, output: QTensor) -> None:
        wanted[layer] = _mean(layer, output)

    def correct(layer: Any, args: tuple[QTensor], output: QTensor) -> QTensor:
        missing = (share * (wanted[layer] - _mean(layer, output))).nan_to_num_(0.0, 0.0, 0.0)
        before = layer.weight.correction
        layer.weight.correction = missing if before is None else before + missing
        corrected: QTensor = layer.forward(*args)
        return corrected

    with twin.in_float(twin.names):
        _hooked(twin, layers, see, batch)
    _hooked(twin, layers, correct, batch)


def _hooked(twin: Twin, layers: Sequence[QuantizedLayer], hook: Any, batch: Batch) -> None:
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        call(twin, batch)
    finally:
        for handle in hooks:
            handle.remove()


def _mean(layer: QuantizedLayer, output: QTensor) -> Tensor:
    """Of each channel (C,), within what the output's codes can stand for: what is beyond it, the function behind the
    layer clips in float, too (ReLU6), or nothing brings back."""
    values, like = output.dequantize(), layer.output
    low, high = ((end - like.zero_point) * like.scale for end in (like.site.qmin, like.site.qmax))
    others = [dim for dim in range(values.dim()) if dim != layer.channel_dim % values.dim()]
    return values.clamp(low, high).mean(others)
