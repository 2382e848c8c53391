"""What a forward costs, and how many images that leaves."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.image_subsets import Split
from cptv_ao.evaluation.cost import Cost, affordable, cost_of


def batch(images: int, fixed: bool = False) -> Batch:
    return Batch((torch.randn(images, 3, 8, 8),), {}, images, fixed)


def test_products_and_convolutions_are_counted_per_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    wanted = 2 * (64 * 4 * 27 + 256 * 10)
    assert cost_of(model, model, batch(6), None).flops == wanted
    assert cost_of(model, model, batch(6, fixed=True), None).flops == wanted, "of a batch that cannot be cut, too"


def test_time_is_measured_only_where_it_is_limited() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    assert cost_of(model, model, batch(4), None).measured == (0.0, 0.0)
    assert min(cost_of(model, model, batch(4), 60.0).measured) > 0.0
    again = cost_of(model, model, batch(4), 60.0, planned=(0.25, 0.5))
    assert again.measured == (0.25, 0.5), "what was measured before is planned by again"
    assert cost_of(nn.Flatten(), model, batch(4), None).flops == 1.0, "nothing that is counted"


def test_a_stage_runs_on_what_it_may_cost() -> None:
    cheap, dear = Cost(1e6), Cost(1e11)
    assert cheap.images(64, forwards=4, share=0.02) == 64
    assert dear.images(64, forwards=1, share=0.02) == 5
    assert dear.images(64, forwards=1, share=0.1) == 25
    assert dear.images(64, forwards=5, share=0.02) == 2, "the least, without which it says nothing"
    assert dear.images(1, forwards=5, share=0.02) == 1
    limited = Cost(1e6, seconds=0.1, limit=100.0)
    assert limited.images(64, forwards=4, share=0.1) == 25, "10 of 100 seconds, .4 an image"
    assert Cost(1e11, seconds=1.0, limit=1e4).images(999, forwards=1, share=0.02) == 200, "more than without a limit"


@pytest.mark.parametrize("fixed", [False, True])
def test_a_limited_search_scores_what_its_seconds_pay_for(fixed: bool) -> None:
    split = Split(tuple(batch(10, fixed) for _ in range(8)), tuple(batch(10, fixed) for _ in range(2)))
    assert affordable(split, Cost(), False) is split
    few = affordable(split, Cost(1.0, 0.05, 0.05, limit=100.0), False)  # 50 of 100
    assert few.images == (60 if fixed else 50), "two batches at least are held out"
    assert sum(b.images for b in few.holdout) == (20 if fixed else 10)
    assert {b.images for b in few.search} == ({10} if fixed else {5})
    least = affordable(split, Cost(1.0, 0.1, 0.1, limit=1e-3), True)
    assert [b.images for b in (*least.search, *least.holdout)] == [10] * 4, "two whole batches of each"


@pytest.mark.parametrize(("limit", "images"), [(100.0, 50), (160.0, 64), (260.0, 65), (300.0, 75)])
def test_images_beyond_enough_get_a_smaller_share(limit: float, images: int) -> None:
    """A tenth of the seconds for up to 64, and a twentieth where that buys more."""
    split = Split((batch(160),), (batch(40),))
    assert affordable(split, Cost(1.0, 0.05, 0.05, limit=limit), False).images == images


@pytest.mark.parametrize(("limit", "images"), [(100.0, 50), (500.0, 250), (512.0, 256), (600.0, 256), (1200.0, 300)])
def test_of_classes_more_images_are_enough(limit: float, images: int) -> None:
    """Few of them make the most of the loss: a tenth of the seconds for up to 256."""
    split = Split((batch(640),), (batch(160),))
    assert affordable(split, Cost(1.0, 0.05, 0.05, limit=limit), False, of_classes=True).images == images


def test_what_a_call_costs_beside_its_images_is_shared_by_a_batch() -> None:
    """A network that takes as long for one image as for many costs an image of a batch its share of that."""

    class Overhead(nn.Flatten):
        def forward(self, value: Tensor) -> Tensor:
            time.sleep(0.01)
            return super().forward(value)

    seconds, _ = cost_of(Overhead(), Overhead(), batch(50), 60.0).measured
    assert 0.01 / 50 <= seconds < 0.01 / 8
