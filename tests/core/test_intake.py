"""What a model takes of what a loader gives, and batches of the size that a graph was exported for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError, CptvWarning
from cptv_ao.core.intake import Intake
from cptv_ao.core.loader import read_batches

ONE, TWO = Intake({"x"}.__contains__, ("x",), ("mask",)), Intake({"a", "b"}.__contains__, ("a", "b"))
PLAIN = Intake({"a", "b"}.__contains__, ("a", "b"), plain=frozenset("ab"))
DICT, PAIR = (Intake({"d"}.__contains__, ("d",), nested={"d": parts}) for parts in (0, 2))
PAIRED = Intake({"p", "b"}.__contains__, ("p", "b"), nested={"p": 2}, plain=frozenset("b"))
MASKED = Intake({"a", "b", "mask"}.__contains__, ("a", "b"), ("mask",))


def images(count: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + count).float().reshape(count, 1)


def exported(**shapes: tuple[int | None, ...]) -> Intake:
    """Of a graph of these inputs, whose first one may be given as a tensor."""
    first = next(iter(shapes))
    paths: dict[Any, Any] = {(name,): shape for name, shape in shapes.items()} | {(0,): shapes[first]}
    return Intake(shapes.__contains__, (first,), shapes=paths)


A, B = images(3), images(3, 3)


@pytest.mark.parametrize(
    ("intake", "item", "args", "kwargs"),
    [
        (ONE, A, (A,), {}),
        (ONE, (A, B), (A,), {}),
        (ONE, ([A, B], "label"), ([A, B],), {}),
        (ONE, {"x": A, "label": B}, (), {"x": A}),
        (TWO, (A, B), (A, B), {}),
        (TWO, [A, B, "label"], (A, B), {}),
        (TWO, ({"a": A, "b": B, "file": "x"}, "label"), (), {"a": A, "b": B}),
        (TWO, ([A], B), ([A], B), {}),
        (MASKED, (A, B), (A, B), {}),
        (PLAIN, ((A, B), "label"), (A, B), {}),
        (PLAIN, [[A, B]], (A, B), {}),
        (DICT, {"a": A, "b": B}, ({"a": A, "b": B},), {}),
        (DICT, ({"a": A, "b": B}, "label"), ({"a": A, "b": B},), {}),
        (DICT, {"d": {"a": A, "b": B}, "label": B}, (), {"d": {"a": A, "b": B}}),
        (PAIR, (A, B), ((A, B),), {}),
        (PAIR, (A, B, "label"), ((A, B),), {}),
        (PAIR, ((A, B), "label"), ((A, B),), {}),
        (PAIRED, ((A, B), B, "label"), ((A, B), B), {}),
    ],
)
def test_inputs_are_told_from_labels(intake: Intake, item: Any, args: Any, kwargs: Any) -> None:
    assert repr(intake.inputs(item, 0)) == repr((args, kwargs))


@pytest.mark.parametrize(
    ("intake", "item", "match"),
    [
        (
            TWO,
            A,
            r"the 2 inputs of the model \(a, b\), got 1 of them; give tuples \(a, b\), or dicts {'a': \.\.\., 'b'",
        ),
        (TWO, (A,), "got 1 of them"),
        (TWO, ((A, B), "label"), "got a tuple whose first item holds 2 values: it may be all inputs, or the first one"),
        (MASKED, (A, B, A), "whose item 2 may be the input mask, or a label; give dicts"),
        (TWO, {"x": A}, r"got none of them among \['x'\]"),
    ],
)
def test_what_may_be_either_is_refused(intake: Intake, item: Any, match: str) -> None:
    with pytest.raises(CalibrationDataError, match=f"calib_loader, batch 4: .*{match}"):
        intake.inputs(item, 4)


def rows(batches: list[Batch]) -> list[list[int]]:
    return [[int(row) for row in next(iter(batch.tensors.values()))] for batch in batches]


@pytest.mark.parametrize(
    ("size", "given", "wanted"),
    [
        (1, [3, 2], [[0], [1], [2], [3], [4]]),
        (2, [1, 1, 3, 2, 1], [[0, 1], [2, 3], [5, 6], [4, 7]]),
        (4, [4, 4], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [8], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_batches_are_put_together_anew(size: int, given: list[int], wanted: list[list[int]]) -> None:
    starts = [sum(given[:index]) for index in range(len(given))]
    loader = [images(count, start) for count, start in zip(given, starts, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_batches(loader, exported(x=(size, 1)))
    assert rows(found) == wanted
    assert all(batch.fixed for batch in found)
    assert all(batch.parts(9) == [(batch, slice(None))] for batch in found)


def test_images_that_fill_no_batch_are_left_out_and_told() -> None:
    with pytest.warns(CptvWarning, match="the last 2 images are left out, .* exported for batches of 4"):
        found = read_batches([images(3), images(3, 3)], exported(x=(4, 1)))
    assert rows(found) == [[0, 1, 2, 3]]
    with pytest.raises(CalibrationDataError, match=r"expected at least 4 images, .* exported, got 3; give more"):
        read_batches([images(3)], exported(x=(4, 1)))


def test_inputs_that_are_the_same_for_all_images_stay_whole() -> None:
    mask = torch.ones(4, 2)
    found = read_batches([{"x": images(8), "mask": mask}], exported(x=(4, 1), mask=(4, 2)))
    assert rows(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(torch.equal(batch.kwargs["mask"], mask) for batch in found)
    with pytest.raises(CalibrationDataError, match="4 of mask, 4 of x, got 6 of mask, 8 of x; export it with a dyn"):
        read_batches([{"x": images(8), "mask": torch.ones(6, 2)}], exported(x=(4, 1), mask=(4, 2)))


def test_images_of_several_lengths_are_not_put_into_one_batch() -> None:
    with pytest.warns(CptvWarning, match="the last 2 images are left out"):
        found = read_batches([torch.ones(3, 5), torch.ones(3, 6)], exported(x=(2, None)))
    assert [tuple(batch.args[0].shape) for batch in found] == [(2, 5), (2, 6)]


def test_an_image_without_a_batch_dimension_is_not_cut() -> None:
    match = r"batch 0: expected an input of 4 dimensions: .* \(1, 3, 8, 8\), got one of shape \(3, 8, 8\)"
    with pytest.raises(CalibrationDataError, match=match):
        read_batches([torch.ones(3, 8, 8)], exported(x=(1, 3, 8, 8)))


def test_batches_may_have_lengths_of_their_own() -> None:
    found = read_batches([torch.ones(2, 5), torch.ones(2, 7)])
    assert [tuple(batch.args[0].shape) for batch in found] == [(2, 5), (2, 7)]
