"""Scales in places that conversions do not make, but people's hands do: shared, as parameters, without memory."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.forms import Injected, exported, lowered, made, refine
from torch import nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.rollback import restored_on_error


def scale_of(model: GraphModule) -> str:
    return next(name for name, _ in model.named_buffers() if "scale" in name and "." not in name)


def test_two_places_with_one_scale_are_told_apart() -> None:
    """Sites are written one by one: one buffer for two of them cannot hold what both were searched to."""
    _, converted, _ = made(lowered)
    first, second = [n for n, _ in converted.named_buffers(remove_duplicate=False) if "_scale_" in n and "." not in n]
    with torch.no_grad():
        setattr(converted, second, getattr(converted, first))
    backend, shared = Backend(converted), getattr(converted, first)
    names = [name for name in backend.sites if name.replace(".", "_") in (first, second.lstrip("_"))]
    wanted = [cptv_ao.QParams(torch.tensor(scale, dtype=torch.float64), torch.tensor(3)) for scale in (0.5, 0.25)]
    with pytest.raises(Injected), restored_on_error(converted, backend):
        raise Injected
    assert getattr(converted, first) is getattr(converted, second) is shared
    with restored_on_error(converted, backend):
        for name, qparams in zip(names, wanted, strict=True):
            backend.write(name, qparams)
    assert [float(backend.read(name).scale) for name in names] == [0.5, 0.25]


def test_a_scale_that_is_a_parameter_is_written_and_put_back() -> None:
    model, converted, _ = made(lowered)
    name = scale_of(converted)
    held = nn.Parameter(getattr(converted, name).detach().clone())
    delattr(converted, name)
    converted.register_parameter(name, held)
    value, backend = float(held), Backend(converted)
    site = next(name for name in backend.sites if name.endswith("input_scale_0"))
    wanted = cptv_ao.QParams(backend.read(site).scale * 2, backend.read(site).zero_point)
    with restored_on_error(converted, backend):
        backend.write(site, wanted)
    assert float(converted.get_parameter(name)) == 2 * value and converted.get_parameter(name).requires_grad

    def half_written() -> None:
        with restored_on_error(converted, backend):
            for factor in (2, 0):
                backend.write(site, cptv_ao.QParams(wanted.scale * factor, wanted.zero_point))

    with pytest.raises(cptv_ao.InvalidScaleError):
        half_written()
    assert float(converted.get_parameter(name)) == 2 * value and float(held) == value
    assert refine(converted, model).moves


def test_scales_that_share_their_memory_are_written() -> None:
    """All channels of a weight on one number: `expand` gives a tensor that nobody can write."""
    _, converted, _ = made(exported)
    name = scale_of(converted)
    with torch.no_grad():
        setattr(converted, name, getattr(converted, name).max().expand(getattr(converted, name).shape))
    refine(converted, None)
    site = next(site for site in Backend(converted).sites.values() if site.kind == "weight" and site.shape == (8,))
    backend = Backend(converted)
    with restored_on_error(converted, backend):
        backend.weights.set_float(site.name, backend.weight(site.name).dequantize())
        now = backend.read(site.name)
        backend.write(site.name, cptv_ao.QParams(now.scale * torch.linspace(1, 2, 8), now.zero_point))
    assert len(set(backend.read(site.name).scale.tolist())) == 8


class ByNumbers(nn.Module):
    """Hard swish as an export writes it, with numbers that the model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 8, 3), nn.Parameter(torch.tensor(1.7))
        self.register_buffer("three", torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) * self.gain
        return (y * torch.clamp(y + self.three, 0, 6)).mean((2, 3))


def test_numbers_of_the_model_that_are_quantized_are_not_taken_for_scales() -> None:
    images = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    model, converted = nets.quantize(nets.seeded(ByNumbers), images)
    backend = Backend(converted)
    numbers = [n for n in converted.graph.nodes if n.target is torch.quantize_per_tensor and n.args[0].op == "get_attr"]
    assert len(numbers) == 2
    assert not backend.sites.unknown
    written = {node: site.name for site in backend.sites.values() for node in site.nodes}
    for node in numbers:
        scale = node.args[1].target
        backend.write(written[node.name], cptv_ao.QParams(torch.tensor(0.5, dtype=torch.float64), torch.tensor(3)))
        assert float(getattr(converted, scale)) == 0.5
    assert float(converted.gain) == float(model.gain) and float(converted.three) == 3.0
