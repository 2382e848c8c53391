"""The batches of the steps of a descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptv_ao import RefineConfig
from cptv_ao.core.batches import Batch
from cptv_ao.evaluation.calibration import Calibration, Images, Pool
from cptv_ao.evaluation.cost import Cost
from cptv_ao.search.proposals import step_images
from cptv_ao.search.proposals.step_images import StepImages


def batch(first: int, images: int) -> Batch:
    return Batch((torch.arange(first, first + images).float()[:, None],), {}, images)


def double(part: Batch) -> Tensor:
    return 2 * part.args[0]


def test_large_batches_are_cut_with_their_targets() -> None:
    batches = (batch(0, 10), batch(10, 3))
    images = StepImages(Calibration(RefineConfig(), Images(batches, tuple(map(double, batches)))), 5)
    assert [images.at(i)[0].images for i in range(len(images))] == [5, 5, 3]
    for index in range(len(images)):
        part, target = images.at(index)
        assert torch.equal(target, double(part))


def test_a_pool_is_taught_where_it_is_needed_and_once() -> None:
    asked: list[int] = []

    def teach(part: Batch) -> Tensor:
        asked.append(part.images)
        return double(part)

    scored = batch(0, 2)
    calibration = Calibration(
        RefineConfig(), Images((scored,), (double(scored),)), pool=Pool((batch(0, 4), batch(4, 6)), teach)
    )
    images = StepImages(calibration, 2)
    assert len(images) == 5 and asked == []
    for index in (3, 3, 1):
        part, target = images.at(index)
        assert torch.equal(target, double(part))
    assert asked == [2, 2]


@pytest.mark.parametrize("most", [1, 100])
def test_a_batch_that_cannot_be_cut_stays_whole(most: int) -> None:
    whole = Batch((torch.zeros(6, 1),), {}, 6, fixed=True)
    images = StepImages(Calibration(RefineConfig(), Images((whole,), (torch.zeros(6, 1),))), most)
    assert len(images) == 1 and images.at(0)[0] is whole


def test_steps_that_are_cut_move_less_by_the_square_root() -> None:
    def rate(images: Batch, most: int, wanted: int | None) -> float:
        return StepImages(Calibration(RefineConfig(), Images((images,), (double(images),))), most, wanted).rate

    assert rate(batch(0, 8), 4, 16) == pytest.approx(0.5)
    assert rate(batch(0, 2), 4, 16) == pytest.approx(0.5), "as if it were cut: the loader gives fewer at once"
    assert rate(batch(0, 40), 32, 16) == 1.0, "no faster for more images"
    assert rate(Batch((torch.zeros(16, 1),), {}, 16, fixed=True), 4, 16) == 1.0, "it cannot be cut, and is not"
    assert rate(batch(0, 8), 4, None) == 1.0


def test_shorter_steps_are_more_as_far_as_they_pay() -> None:
    def steps(flops: float) -> int:
        calibration = Calibration(RefineConfig(), Images((batch(0, 8),), (double(batch(0, 8)),)), cost=Cost(flops))
        return StepImages(calibration, 4, 16).steps(600)

    assert steps(1.0) == 1200
    assert steps(0.25 * step_images._DESCENT / 1000) == 1000
    assert steps(0.25 * step_images._DESCENT) == 600, "as many as were asked for at least"
