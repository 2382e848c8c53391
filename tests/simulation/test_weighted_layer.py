"""Layers of the twin with a weight on a scale: what another scale of the weight would do to their outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import nets
from torch import nn

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.weight_rounding import along_axis
from cptv_ao.simulation import weighted_layer
from cptv_ao.simulation.layer_inputs import layer_inputs
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.twin import Twin

LAYERS = {
    "linear": (nn.Linear(12, 5, bias=False), (3, 12)),
    "conv": (nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), (4, 9, 9)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), (6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, (3, 1), groups=6, dilation=2, bias=False), (6, 9, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (4, 5, 5)),
}


@pytest.mark.parametrize("at_once", [weighted_layer._AT_ONCE, 30])
@pytest.mark.parametrize("images", [1, 40])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_errors_of_a_weight_are_those_of_the_outputs(
    kind: str, images: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, in float64; of few rows one by one, of many by their Gram matrix, which must say the same, as must a few
    channels after the others."""
    monkeypatch.setattr(weighted_layer, "_AT_ONCE", at_once)
    layer, shape = LAYERS[kind]
    inputs = nets.images(images, *shape)
    network, transposed = nn.Sequential(layer), isinstance(layer, nn.ConvTranspose2d)  # which x86 has no kernel for
    engine = "qnnpack" if transposed else "x86"
    prepared, model = nets.quantize(network, [inputs], engine=engine, weight_bits=3, per_tensor=transposed)
    backend = Backend(model)
    attach_float_weights(backend, prepared)
    twin = Twin(backend)
    with twin.in_float(twin.names):
        ((own, value),) = layer_inputs(twin, Batch((inputs,), {}, images)).items()
    assert isinstance(value, QTensor)
    error_at, site = own.weight_error(value.dequantize(), 16_384), own.weight.site
    for factor in (0.7, 1.1):
        scale = own.weight.scale * factor
        steps = along_axis(scale, site.axis, layer.weight.dim())
        apart = (layer.weight / steps).round().clamp(site.qmin, site.qmax) * steps - layer.weight
        outputs = torch.func.functional_call(copy.deepcopy(layer).double(), {"weight": apart.double()}, inputs.double())
        wanted = outputs.square().movedim(own.channel_dim, 0).flatten(1).sum(1)
        assert torch.allclose(error_at(scale), wanted.float(), rtol=1e-3, atol=1e-5)
