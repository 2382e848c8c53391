"""Factors of the channels of what linear layers read: they cost less than none where channels are unlike, and there
are none where they are alike."""

from __future__ import annotations

import pytest
import torch
from helpers.quick import each_value
from torch import Tensor

from cptv_ao.transforms.input_factors import ReadWeights, input_exponents

CHANNELS, ROWS = 16, 32


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(256, CHANNELS, generator=generator), torch.randn(ROWS, CHANNELS, generator=generator)


def read(weight: Tensor, alone: bool = True) -> ReadWeights:
    return ReadWeights(weight.square().sum(0), weight.abs(), 1.0, 127.5, alone)


def error(values: Tensor, weight: Tensor, exponents: Tensor, codes: int) -> float:
    """Mean square of what rounding the values takes from the products, at the best of many ranges."""
    factors = torch.exp2(exponents)
    scaled, divided = values * factors, weight / factors
    errors = []
    for clipped in torch.linspace(0.2, 1, 17):
        step = 2 * float(clipped) * float(scaled.abs().max()) / codes
        made = (scaled / step).round().clamp(-(codes // 2), codes // 2) * step
        errors.append(float(((made - scaled) @ divided.T).square().mean()))
    return min(errors)


@pytest.mark.parametrize(("codes", "alone", "seed"), each_value((15, 255), [True, False], [0, 1, 2]))
def test_unlike_channels_are_brought_to_sizes_that_cost_less(codes: int, alone: bool, seed: int) -> None:
    values, weight = drawn(seed)
    size = torch.exp2(torch.arange(CHANNELS) % 6.0)
    values, weight = values * size, weight / size
    none = torch.zeros(CHANNELS)
    found = input_exponents(values, read(weight, alone), codes)
    assert found is not None and torch.equal(found, found.round())
    assert error(values, weight, found, codes) < 0.5 * error(values, weight, none, codes)


@pytest.mark.parametrize("codes", [15, 255])
def test_like_channels_stay(codes: int) -> None:
    values, weight = drawn(0)
    assert input_exponents(values, read(weight), codes) is None


def test_weights_of_few_codes_take_no_more_than_they_can() -> None:
    """Where columns are unlike the other way round, what the values gain is what the weights lose."""
    values, weight = drawn(1)
    size = torch.exp2(torch.arange(CHANNELS) % 6.0)
    values, weight = values * size, weight * size
    two_bits = ReadWeights(weight.square().sum(0), weight.abs(), 1.0, 1.5, True)
    found = input_exponents(values, two_bits, 255)
    assert found is None or float(found.max() - found.min()) < 5


@pytest.mark.parametrize("dead", [slice(0, 1), slice(0, CHANNELS)])
def test_channels_that_are_always_zero_cost_nothing(dead: slice) -> None:
    values, weight = drawn(2)
    values[:, dead] = 0
    found = input_exponents(values, read(weight), 15)
    assert found is None or bool(found.isfinite().all())
    weight[:, dead] = 0
    found = input_exponents(values, read(weight), 15)
    assert found is None or bool(found.isfinite().all())
