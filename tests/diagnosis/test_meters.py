"""How far quantized tensors are from float ones, against sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import nets
from helpers.fake_store import activation, qparams
from torch import Tensor, nn

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.sites import ScaleSite
from cptv_ao.diagnosis.meters import ActivationMeter, Fidelity, decibels, measured_weight


@pytest.mark.parametrize(
    ("signal", "noise", "wanted"),
    [(100.0, 1.0, 20.0), (1.0, 100.0, -20.0), (1.0, 0.0, math.inf), (0.0, 1.0, -math.inf)],
)
def test_decibels(signal: float, noise: float, wanted: float) -> None:
    assert decibels(signal, noise) == pytest.approx(wanted)


def test_fidelity_is_over_all_batches_and_images() -> None:
    found = Fidelity()
    assert found.sqnr is None and found.cosine is None
    wanted = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    found.add(wanted, wanted)
    assert found.sqnr == math.inf and found.cosine == pytest.approx(1.0)
    found.add(torch.tensor([[4.0, -3.0]]), torch.tensor([[3.0, 4.0]]))  # at a right angle
    assert found.cosine == pytest.approx(2 / 3)
    assert found.sqnr == pytest.approx(10 * math.log10(75 / 50))


def meter(site: ScaleSite, scale: float = 0.5, zero_point: int = 10) -> ActivationMeter:
    return ActivationMeter(site, qparams(scale, site, zero_point))


def test_what_is_beyond_the_codes_is_clipped() -> None:
    found = meter(activation("a"))
    value = torch.tensor([-5.0, 0.0, 0.24, 122.5, 130.0, -6.0])  # codes 0, 10, 10, 255, 270, -2
    found.add(value)
    told = found.measured()
    noise = 0.24**2 + 7.5**2 + 1.0**2
    assert told["clipped"] == pytest.approx(2 / 6) and told["used"] == 1.0
    assert told["sqnr"] == pytest.approx(10 * math.log10(float(value.double().square().sum()) / noise))


def test_batches_add_up() -> None:
    apart, whole = meter(activation("a")), meter(activation("a"))
    values = nets.images(6, 4, 3)
    for part in values.split(2):
        apart.add(part)
    whole.add(values)
    first, second = apart.measured(), whole.measured()
    assert first.keys() == second.keys() >= {"used", "sqnr", "clipped", "outlier", "outlier_channels"}
    assert all(first[name] == pytest.approx(second[name]) for name in first)


def test_codes_alone_say_what_is_used_and_no_more() -> None:
    found = meter(activation("a"))
    assert found.measured() == {} and found.high_share == 0.0
    found.add_codes(torch.tensor([20, 60, 129, 147]))
    assert found.measured() == {"used": 128 / 256}
    assert found.high_share == pytest.approx(1 / 4), "129 with -128 fits into 16 bits, what is higher may not"


@pytest.mark.parametrize(
    ("shape", "channels", "wanted"),
    [((4, 8), None, 1), ((2, 4, 8), None, 1), ((2, 8, 3, 3), 1, 1), ((2, 8, 3, 3), None, 0)],
)
def test_outliers_are_of_channels_where_these_are_certain(
    shape: tuple[int, ...], channels: int | None, wanted: int
) -> None:
    site = replace(activation("a"), channels=channels)
    value = torch.ones(shape)
    value.select(len(shape) - 1 if channels is None else channels, 2).fill_(40.0)
    found = meter(site)
    found.add(value)
    told = found.measured()
    assert told.get("outlier_channels", 0) == wanted
    assert not wanted or told["outlier"] == pytest.approx(40.0)


@pytest.fixture
def linear() -> tuple[nn.Module, Backend]:
    net = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 4)))
    _, converted = nets.quantize(net, [nets.images(8, 6)], weight_bits=4)
    return net, Backend(converted)


def test_a_weight_against_its_float_weight(linear: tuple[nn.Module, Backend]) -> None:
    net, backend = linear
    site = next(site for site in backend.sites.values() if site.kind == "weight")
    assert measured_weight(backend, site).keys() == {"used"}, "without a float weight"
    attach_float_weights(backend, net)
    told, made = measured_weight(backend, site), backend.weight(site.name)
    wanted: Tensor = net[0].weight.detach()
    noise = (made.dequantize().double() - wanted.double()).square().sum()
    assert told["sqnr"] == pytest.approx(10 * math.log10(float(wanted.double().square().sum() / noise)))
    codes = made.int_repr()
    used = [(int(row.max()) - int(row.min()) + 1) / (site.qmax - site.qmin + 1) for row in codes]
    assert told["used"] == pytest.approx(sum(used) / len(used))
    assert told["clipped"] == 0.0


def test_a_scale_that_is_too_small_clips_a_weight(linear: tuple[nn.Module, Backend]) -> None:
    net, backend = linear
    attach_float_weights(backend, net)
    site = next(site for site in backend.sites.values() if site.kind == "weight")
    given = backend.read(site.name)
    before = measured_weight(backend, site)
    backend.write(site.name, replace(given, scale=given.scale / 4))
    after = measured_weight(backend, site)
    assert after["clipped"] > 0.3 and after["sqnr"] < before["sqnr"] and after["used"] >= before["used"]
