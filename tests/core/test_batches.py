"""Batches: read once, cut where they can be, split for good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError
from cptv_ao.core.image_subsets import first_images, split_batches, spread_images
from cptv_ao.core.intake import Intake
from cptv_ao.core.loader import read_batches
from cptv_ao.core.nested import leaves, mapped


def images(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count).float().reshape(count, 1)


def test_labels_are_left_and_inputs_are_our_own() -> None:
    given = images(3)
    (batch,) = read_batches([(given, "a label")])
    assert batch.images == 3 and len(batch.args) == 1
    given.zero_()
    assert torch.equal(batch.args[0], images(3))


def test_reading_stops_once_there_are_enough() -> None:
    assert len(read_batches((images(4) for _ in range(9)), limit=6)) == 2


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        ([], "got an empty iterable"),
        (images(3), "wrap it in a list"),
        ([images(3), images(3).double()], "batch 1: expected images of shape"),
        ([images(3) / 0], "batch 0: the input holds NaN or inf"),
        ([3], "batch 0: expected a tensor"),
        ([images(0)], "at least one image"),
    ],
)
def test_what_is_no_loader_is_refused(loader: object, match: str) -> None:
    with pytest.raises(CalibrationDataError, match=match):
        read_batches(loader)  # type: ignore[arg-type]


def test_parts_have_all_images_and_their_rows_of_the_output() -> None:
    mask = torch.ones(5, 2)
    batch = Batch((images(5),), {"m": [mask, "x"], "s": torch.ones(5)}, 5, shared=frozenset({("s",)}), per_image=2)
    parts = batch.parts(2)
    assert [part.images for part, _ in parts] == [2, 3]
    assert [rows for _, rows in parts] == [slice(0, 4), slice(4, 10)]
    assert torch.equal(torch.cat([part.args[0] for part, _ in parts]), images(5))
    assert [part.kwargs["m"][0].shape[0] for part, _ in parts] == [2, 3]
    assert all(part.kwargs["m"][1] == "x" and part.kwargs["s"].shape == (5,) for part, _ in parts)


def test_all_tensors_of_a_batch_go_to_a_device() -> None:
    batch = Batch((images(3), 2), {"both": [images(3), None]}, 3, fixed=True)
    there = batch.to("meta")
    assert {tensor.device.type for tensor in there.tensors.values()} == {"meta"}
    assert there.sizes == batch.sizes and len(there.sizes) == 2
    assert (there.args[1], there.kwargs["both"][1], there.images, there.fixed) == (2, None, 3, True)


def test_a_fixed_batch_is_never_cut() -> None:
    batch = Batch((images(5),), {}, 5, fixed=True)
    assert batch.parts(3) == [(batch, slice(None))]
    assert batch.few(2) is batch
    assert Batch((images(5),), {}, 5).few(2).images == 2


@pytest.mark.parametrize(("count", "fraction", "held"), [(4, 0.25, 1), (4, 0.6, 2), (2, 0.9, 1), (4, 0.0, 0)])
def test_the_last_batches_are_held_out(count: int, fraction: float, held: int) -> None:
    batches = [Batch((images(2, 2 * i),), {}, 2) for i in range(count)]
    split = split_batches(batches, fraction)
    assert [*split.search, *split.holdout] == batches
    assert len(split.holdout) == held


def test_of_a_single_batch_images_are_held_out() -> None:
    split = split_batches([Batch((images(10),), {}, 10)], 0.25)
    assert torch.equal(split.search[0].args[0], images(8))
    assert torch.equal(split.holdout[0].args[0], images(2, 8))
    with pytest.raises(CalibrationDataError, match="at least 2 images, got 1"):
        split_batches([Batch((images(1),), {}, 1)], 0.25)
    with pytest.raises(CalibrationDataError, match="which cannot be cut"):
        split_batches([Batch((images(4),), {}, 4, fixed=True)], 0.25)


def test_leaves_are_changed_where_they_stand() -> None:
    nested = {"a": [1, (2, 3)], "b": 4}
    assert dict(leaves(nested)) == {("a", 0): 1, ("a", 1, 0): 2, ("a", 1, 1): 3, ("b",): 4}
    assert mapped(nested, lambda path, value: value * len(path)) == {"a": [2, (6, 9)], "b": 4}


def test_the_first_images_of_batches() -> None:
    batches = [Batch((images(4, 4 * k),), {}, 4) for k in range(3)]
    found = first_images(batches, 6)
    assert torch.cat([batch.args[0] for batch in found]).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert sum(batch.images for batch in first_images(batches, 100)) == 12
    fixed = [Batch((images(4),), {}, 4, fixed=True)] * 3
    assert sum(batch.images for batch in first_images(fixed, 6)) == 8


@pytest.mark.parametrize(
    ("count", "sizes"), [(100, [10] * 6), (60, [10] * 6), (30, [5] * 6), (12, [2] * 6), (4, [2, 2])]
)
def test_images_are_spread_over_all_batches(count: int, sizes: list[int]) -> None:
    batches = [Batch((images(10, 10 * k),), {}, 10) for k in range(6)]
    found = spread_images(batches, count)
    assert [batch.images for batch in found] == sizes
    firsts = [int(batch.args[0][0]) // 10 for batch in found]
    assert firsts == sorted(set(firsts)) and firsts[0] == 0, "of other batches each"


def test_whole_batches_are_spread_where_they_must_stay_whole() -> None:
    batches = [Batch((images(10, 10 * k),), {}, 10) for k in range(6)]
    assert [int(batch.args[0][0]) for batch in spread_images(batches, 30, whole=True)] == [0, 20, 40]
    assert [batch.images for batch in spread_images(batches, 1, whole=True)] == [10, 10], "two at least"
    assert spread_images([], 5) == []


def test_batches_must_be_alike_and_names_that_nobody_takes_are_left() -> None:
    given = [{"x": images(3), "mask": None, "y": "a"}, {"x": images(3), "mask": images(3), "y": "b"}]
    with pytest.raises(CalibrationDataError, match="a tensor at mask in one of them"):
        read_batches(given, Intake({"x", "mask"}.__contains__))
    found = read_batches(given, Intake({"x"}.__contains__))
    assert [list(batch.kwargs) for batch in found] == [["x"], ["x"]]
    with pytest.raises(CalibrationDataError, match="got none of them among"):
        read_batches(given, Intake({"z"}.__contains__))
