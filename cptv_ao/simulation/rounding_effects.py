"""What the rounding of each site does to the outputs, to first order, image by image, from one pass in float."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.simulation.activations import Pull, followed
from cptv_ao.simulation.qtensor import QTensor, dequantize
from cptv_ao.simulation.twin import Twin
from cptv_ao.simulation.weighted_layer import WeightedLayer


def rounding_effects(twin: Twin, batch: Batch, pull: Pull) -> dict[str, Tensor]:
    """Run a batch through the twin in float, forward and backward.

    Args:
        pull: makes one number of the outputs, of each image a part of its own.

    Returns:
        By site, how much of that number its rounding adds, image by image (N,); without sites that the outputs do not
        depend on, and weights whose float ones are not known.
    """
    weights = {id(module): name for name, module in twin.sites.modules.items()}
    seen: list[tuple[str, Tensor, Tensor]] = []  # a site, what the outputs are followed to, and what is added there

    def see(module: nn.Module, args: Any, output: Any, site: str | None) -> None:
        if site is not None:
            codes = output.codes
            rounded = replace(output, rounding="round").limits().fit(codes.detach())
            seen.append((site, codes, rounded.sub_(codes.detach())))
        if isinstance(module, WeightedLayer):
            _see_weight(module, args[0], output, weights, seen)

    number = followed(twin, {name: twin.sites.get(name).scale for name in twin.names}, batch, pull, see)
    if not seen or not number.requires_grad:
        return {}
    gradients = torch.autograd.grad(number, [at for _, at, _ in seen], allow_unused=True)
    found: dict[str, Tensor] = {}
    for (name, _, added), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            found[name] = found.get(name, 0.0) + _by_image(gradient * added, batch.images)
    return found


def _see_weight(
    layer: WeightedLayer,
    value: Any,
    output: Any,
    weights: dict[int, str],
    seen: list[tuple[str, Tensor, Tensor]],
) -> None:
    with torch.no_grad():
        shift = layer.weight_shift(dequantize(value))
        if shift is None:
            return
        if isinstance(output, QTensor):  # where a ReLU is fused, nothing passes that it cut off
            output, shift = output.codes, shift / output.scale * (output.codes != 0)
    seen.append((weights[id(layer.weight)], output, shift))


def _by_image(values: Tensor, images: int) -> Tensor:
    """The sums over each image (images,); what has other rows is shared out evenly."""
    values = values.double()
    if values.dim() and values.shape[0] % images == 0:
        return values.reshape(images, -1).sum(1).cpu()
    return (values.sum() / images).expand(images).cpu()
