"""Ranges of channels of which few values are known: they hold what others will be."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.transforms.channel_ranges import ChannelRange
from cptv_ao.transforms.equalize import equalize


def seen(values: Tensor) -> ChannelRange:
    """Of values by channel (C, N)."""
    return ChannelRange(values.amin(1), values.amax(1), values.square().mean(1), values)


@pytest.mark.parametrize("count", [2, 4, 6, 16, 32])
def test_few_values_reach_as_far_as_many(count: int) -> None:
    values = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0)) + torch.linspace(-9, 9, 256)[:, None]
    few, many = seen(values[:, :count]).reached, seen(values)
    width = (few.high - few.low) / (many.high - many.low)
    assert 0.4 < float(width.median()) < 1.1
    held = (values >= few.low[:, None]) & (values <= few.high[:, None])
    assert float(held.float().mean()) > {2: 0.7, 4: 0.9}.get(count, 0.95)


def test_ends_stay_where_there_is_enough_to_tell_and_where_there_is_one_value() -> None:
    values = torch.rand(8, 64)
    many, one = seen(values), seen(values[:, :1])
    assert many.reached is many and one.reached is one


def test_what_is_on_one_side_of_zero_stays_there() -> None:
    values = torch.rand(8, 6)
    above, below = seen(values).reached, seen(-values).reached
    assert bool((above.low >= 0).all()) and bool((above.high > values.amax(1)).any())
    assert bool((below.high <= 0).all()) and torch.equal(below.low, -above.high)


class Pooled(nn.Module):
    """A norm behind a pool: one value of a channel an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 24, 3), nn.LayerNorm(24), nn.Linear(24, 8)
        nn.init.uniform_(self.norm.bias, -4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).mean((2, 3))))


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_form_found_on_six_images_fits_others(seed: int) -> None:
    model, images, unseen = nets.seeded(Pooled, seed), nets.images(64, 3, 8, 8), nets.images(256, 3, 8, 8, seed=9)

    def error(count: int) -> float:
        case = Case(model, *nets.quantize(model, [images]), [images])
        assert equalize(backend_of(case), [Batch((images[:count],), {}, count)])
        return float((case.converted(unseen) - model(unseen)).square().mean())

    assert error(6) < 1.6 * error(64)
