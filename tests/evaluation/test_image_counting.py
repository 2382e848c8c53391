"""How many images a batch holds, and what of it may be cut: what the model's outputs tell."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from torch import Tensor, nn

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.loader import read_batches
from cptv_ao.evaluation.float_runs import FloatRuns
from cptv_ao.evaluation.image_counting import counted

LENGTH, WIDTH = 6, 8


class Attention(nn.Module):
    """Of images (N, L, D): a mask of (L, L) or (1, L, L), positions of (1, L), a scale, and what makes a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, mask: Tensor, positions: Tensor, scale: Tensor, x: Tensor, unused: Any = None) -> Tensor:
        x = x * scale + self.embed(positions)
        weights = torch.softmax(x @ x.transpose(1, 2) + mask, -1)
        return self.b(torch.relu(self.a(weights @ x)).mean(1))


def inputs(images: int, seed: int, mask_dims: int = 2) -> dict[str, Tensor]:
    mask = torch.triu(torch.full((LENGTH, LENGTH), -4.0), 1)
    return {
        "mask": mask if mask_dims == 2 else mask[None],
        "positions": torch.arange(LENGTH)[None],
        "scale": torch.tensor(0.5),
        "x": nets.images(images, LENGTH, WIDTH, seed=seed),
    }


def counts(teacher: nn.Module, batches: list[Any]) -> list[Batch]:
    with torch.no_grad():
        return counted(read_batches(batches), FloatRuns(teacher))


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(*batch.args, **batch.kwargs)


@pytest.fixture(scope="module")
def attention() -> nn.Module:
    return nets.seeded(Attention)


@pytest.mark.parametrize("mask_dims", [2, 3])
@pytest.mark.parametrize("sizes", [[4, 4], [4, 2], [1, 1], [1, 4], [LENGTH, 4], [4, LENGTH], [4], [9]])
def test_the_first_tensor_need_not_be_the_images(attention: nn.Module, sizes: list[int], mask_dims: int) -> None:
    batches = counts(attention, [inputs(n, i, mask_dims) for i, n in enumerate(sizes)])
    assert [batch.images for batch in batches] == sizes
    for batch in batches:
        assert not batch.fixed
        part = batch.rows(batch.images // 2, batch.images)
        torch.testing.assert_close(outputs(attention, part), outputs(attention, batch)[batch.images // 2 :])
        assert torch.equal(part.kwargs["mask"], batch.kwargs["mask"])


def test_rows_that_are_images_by_coincidence_are_not_cut(attention: nn.Module) -> None:
    """L == N in each batch, and no other batch tells the two apart: the outputs do."""
    batches = counts(attention, [inputs(LENGTH, seed) for seed in range(2)])
    assert all(batch.images == LENGTH and batch.fixed for batch in batches)
    assert batches[0].few(2) is batches[0]


class Table(nn.Module):
    """Looks rows of a table up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, table: Tensor, rows: Tensor) -> Tensor:
        return self.fc(table[rows])


def test_a_table_with_as_many_rows_as_images_is_not_cut() -> None:
    batch = {"table": nets.images(4, WIDTH), "rows": torch.tensor([3, 1, 2, 0])}
    assert counts(nets.seeded(Table), [batch])[0].fixed
    other = {"table": nets.images(4, WIDTH), "rows": torch.tensor([3, 1])}
    found = counts(nets.seeded(Table), [batch, other])
    assert [(b.images, b.fixed) for b in found] == [(4, False), (2, False)]


class Rows(nn.Module):
    """A function of rows in front of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.fc = function, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(x))


@pytest.mark.parametrize(
    ("function", "shape", "fixed", "per_image"),
    [
        (lambda x: x, (4, WIDTH), False, 1),
        (lambda x: x - x.mean(0), (4, WIDTH), True, 1),
        (lambda x: x.cumsum(0), (4, WIDTH), True, 1),
        (lambda x: x.view(4, -1), (4, WIDTH), True, 1),
        (lambda x: x.reshape(-1, WIDTH), (4, LENGTH, WIDTH), False, LENGTH),
        (lambda x: x.transpose(0, 1), (4, LENGTH, WIDTH), True, 1),
        (lambda x: x.transpose(0, 1).reshape(-1, WIDTH), (4, LENGTH, WIDTH), True, 1),
        (lambda x: x.mean((0, 1)), (4, LENGTH, WIDTH), True, 1),
        (lambda x: x.squeeze(), (4, 1, WIDTH), False, 1),
    ],
)
def test_rows_that_depend_on_each_other_are_not_cut(
    function: Any, shape: tuple[int, ...], fixed: bool, per_image: int
) -> None:
    (batch,) = counts(nets.seeded(lambda: Rows(function)), [nets.images(*shape)])
    assert (batch.images, batch.fixed, batch.per_image) == (4, fixed, per_image)


def test_parts_come_with_their_rows_of_the_output() -> None:
    model = nets.seeded(lambda: Rows(lambda x: x.reshape(-1, WIDTH)))
    (batch,) = counts(model, [nets.images(7, LENGTH, WIDTH)])
    whole, parts = outputs(model, batch), batch.parts(3)
    assert [part.images for part, _ in parts] == [2, 2, 3]
    for part, rows in parts:
        torch.testing.assert_close(outputs(model, part), whole[rows])
    assert Batch(batch.args, {}, 7, fixed=True).parts(3)[0][1] == slice(None)


def test_a_search_on_inputs_of_several_sizes(attention: nn.Module) -> None:
    """Images that count alike, and a model that is never shown a mask that was cut."""
    batches = [inputs(n, seed) for seed, n in enumerate((LENGTH, LENGTH, 4, LENGTH))]
    calls = [tuple(batch[name] for name in ("mask", "positions", "scale", "x")) for batch in batches]
    _, model = nets.quantize(attention, calls, weight_bits=3)
    config = small_config(gradient_steps=4, population=("output_error",))
    cptv_ao.refine(model, batches, float_model=attention, config=config, progress=False)
    assert cptv_ao.report(model).images == (2 * LENGTH + 4, LENGTH)
    assert cptv_ao.diagnose(model, batches, float_model=attention, progress=False).images == 3 * LENGTH + 4


def test_a_single_batch_that_cannot_be_cut_is_refused(attention: nn.Module) -> None:
    batch = inputs(LENGTH, 0)
    _, model = nets.quantize(attention, [tuple(batch.values())], weight_bits=3)
    with pytest.raises(
        cptv_ao.CalibrationDataError, match="at least 2 batches, got 1 of 6 images, which cannot be cut"
    ):
        cptv_ao.refine(model, [batch], float_model=attention, config=small_config(), progress=False)


@pytest.mark.parametrize("make", [dict, OrderedDict, UserDict])
def test_any_mapping_holds_keyword_inputs(attention: nn.Module, make: Any) -> None:
    (batch,) = counts(attention, [make(inputs(4, 0), unused=None)])
    assert batch.images == 4
    assert batch.rows(1, 3).kwargs["x"].shape == (2, LENGTH, WIDTH)
    assert batch.kwargs["unused"] is None


class Nested(nn.Module):
    """Takes a dict of a list, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, given: Any, factor: float, flag: bool) -> Tensor:
        return self.fc(given["parts"][0] + given["parts"][1])


def test_nested_inputs_and_numbers() -> None:
    net = nets.seeded(Nested)
    batches = [
        {"given": {"parts": [nets.images(n, WIDTH, seed=n), torch.ones(WIDTH)]}, "factor": 0.5, "flag": True}
        for n in (WIDTH, 4, 5)
    ]
    found = counts(net, batches)
    assert [(b.images, b.fixed) for b in found] == [(WIDTH, False), (4, False), (5, False)]
    torch.testing.assert_close(outputs(net, found[0].rows(2, 5)), outputs(net, found[0])[2:5])
    _, model = nets.quantize(net, [tuple(batch.values()) for batch in batches], weight_bits=3)
    given = [batch["given"]["parts"][0].clone() for batch in batches]
    config = small_config(gradient_steps=4, population=("output_error",))
    cptv_ao.refine(model, batches, float_model=net, config=config, progress=False)
    assert cptv_ao.report(model).images == (WIDTH + 4, 5)
    assert all(torch.equal(a, b["given"]["parts"][0]) for a, b in zip(given, batches, strict=True))


def test_the_model_is_asked_no_more_than_it_must(attention: nn.Module) -> None:
    """One batch where all inputs have as many rows, however many batches there are."""
    model, asked = nets.seeded(lambda: nets.Norm(WIDTH)), list[int]()
    model.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    counts(model, list(itertools.repeat(nets.images(100, WIDTH), 50)))
    assert asked == [4, 2, 2]
