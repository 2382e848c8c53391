"""Residual streams that the recipe rotates, at no change of the function, and those that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.open import open_model
from cptv_ao.transforms.equalize import rotatable
from cptv_ao.transforms.float_model.rotation import rotation

WIDTH, OUTLIER, OUTLIERS = 64, 40.0, [2, 9]


def gained(norm: nn.LayerNorm) -> None:
    """Give back to the other channels what outliers take from them, as training does."""
    with torch.no_grad():
        norm.weight.normal_(6, 1)
        norm.weight[OUTLIERS] = 0.2
        norm.bias.normal_(0, 0.3)


class Branch(nn.Module):
    """What is added to a stream: a norm, two layers, factors by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.drop, self.gamma = nn.Dropout(0.1), nn.Parameter(torch.rand(WIDTH) + 0.5)
        gained(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(torch.relu(self.fc1(self.norm(x))))) * self.gamma


class Stream(nn.Module):
    """A small vision transformer without attention; two channels of its stream are outliers."""

    def __init__(self, outlier: float = OUTLIER) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.first, self.second = Branch(), Branch()
        self.norm, self.neck, self.head = nn.LayerNorm(WIDTH), nn.Identity(), nn.Linear(WIDTH, 6)
        gained(self.norm)
        with torch.no_grad():
            self.position[..., OUTLIERS[0]] += outlier
            self.first.fc2.bias[OUTLIERS[1]] -= outlier

    def rows(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.first(x)
        return x + self.second(x)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.neck(self.norm(self.rows(images))[:, 0]))


class SquareHead(Stream):
    """Has as many classes as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)


class Headless(Stream):
    """Returns its norm, behind an identity."""

    def forward(self, images: Tensor) -> Any:
        return self.neck(self.norm(self.rows(images))[:, 0])


class Bare(Stream):
    """Returns its norm."""

    def forward(self, images: Tensor) -> Any:
        return self.norm(self.rows(images))


class Pooled(Stream):
    """Has its head behind a mean, and a layer that reads the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(WIDTH, 6, bias=False)

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows).mean(1)) + self.side(rows[:, 0])


class Functions(Stream):
    """Its head is a function, of a weight and a bias of its own."""

    def forward(self, images: Tensor) -> Any:
        return functional.linear(self.norm(self.rows(images)), self.head.weight, self.head.bias)


class Sized(Stream):
    """Its rows are put together by sizes that it computes."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        count, places, width = rows.shape
        rows = rows.reshape(count * places, width).reshape(count, places, 2 * width // 2)
        return self.head(self.norm(rows))


class NoBias(Stream):
    """Its head has no bias, though its norm has one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 6, bias=False)
        nn.init.normal_(self.norm.bias)


class Rows(Stream):
    """Each patch has an output."""

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.rows(images)))


class Text(nn.Module):
    """Reads words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(5, WIDTH)
        self.first, self.norm, self.head = Branch(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.register_buffer("places", torch.arange(5))
        with torch.no_grad():
            self.positions.weight[:, OUTLIERS] += OUTLIER

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids) + self.positions(self.places)
        return self.head(self.norm(x + self.first(x)))


class TiedText(Text):
    """Its head has the weight of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 11)
        self.head.weight = self.words.weight


class WithRelu(Stream):
    """Something that is not linear reads the stream."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows)) + torch.relu(rows).sum()


class Returned(Stream):
    """The stream is returned, too."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows)), rows


class NormTwice(Stream):
    """Its last norm is also that of the second branch."""

    def __init__(self) -> None:
        super().__init__()
        self.second.norm = self.norm


class SharedLayer(Stream):
    """A layer that writes into the stream is at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.second.fc2 = self.first.fc2


class SharedTensor(Stream):
    """A tensor of the stream is read elsewhere, too."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images) + self.token.sum()


class Scaled(Stream):
    """The norm is multiplied by itself before its head."""

    def forward(self, images: Tensor) -> Any:
        y = self.norm(self.rows(images))
        return self.head(y * y)


class Constant(Stream):
    """The stream is multiplied by a number that tracing keeps as a tensor of its own."""

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(torch.tensor(0.5) * self.rows(images)))


class Cut(Stream):
    """Half of the channels alone are read."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH // 2, 6)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.rows(images))[..., : WIDTH // 2])


class Crossed(Stream):
    """Channels and rows change places in the stream, of which there are as many."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images).repeat(1, 13, 1)[:, :WIDTH]
        return self.head(self.norm(rows + rows.transpose(1, 2)))


def images(count: int = 8, seed: int = 0) -> Tensor:
    return nets.images(count, 3, 8, 8, seed=seed)


def rotated(model: nn.Module) -> tuple[cptv_ao.Recipe, bool]:
    ready = cptv_ao.recipe(model, (images(),))
    return ready, "residual stream" in str(ready)


@pytest.mark.parametrize("width", [2, 3, 16, 384])
def test_the_rotation_is_one_and_leaves_the_mean(width: int) -> None:
    turn, ones = rotation(width), torch.ones(width, dtype=torch.float64)
    assert torch.allclose(turn @ turn.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn @ ones, ones, atol=1e-12)
    assert torch.equal(turn, rotation(width))


@pytest.mark.parametrize("make", [Stream, Headless, Bare, Pooled, Functions, Sized, NoBias])
def test_the_function_stays_and_the_outliers_go(make: Any) -> None:
    model = nets.seeded(make)
    state, test = copy.deepcopy(model.state_dict()), images(5, seed=3)
    ready, done = rotated(model)
    assert done, str(ready)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "the given model changed"
    with torch.no_grad():
        torch.testing.assert_close(ready.model(test), model(test), rtol=1e-4, atol=1e-4)
        rows = [Stream.rows(any_model, test).abs().max() for any_model in (model, ready.model)]
    assert rows[1] < rows[0] / 2
    found = ready.model.state_dict()
    assert bool((found["first.norm.weight"] == 1).all() and (found["first.norm.bias"] == 0).all())
    assert bool((found["second.gamma"] == 1).all())


def test_where_the_norm_is_returned_a_layer_rotates_back() -> None:
    assert type(rotated(nets.seeded(Headless))[0].model.neck) is nn.Linear
    behind: Any = rotated(nets.seeded(Bare))[0].model.norm
    assert [type(part) for part in behind] == [nn.LayerNorm, nn.Linear]
    assert "a linear layer at neck rotates back" in str(rotated(nets.seeded(Headless))[0])
    assert type(rotated(nets.seeded(Stream))[0].model.neck) is nn.Identity


@pytest.mark.parametrize(
    "make",
    [WithRelu, Returned, NormTwice, SharedLayer, SharedTensor, Scaled, Constant, Cut, Crossed],
    ids=lambda make: make.__name__,
)
def test_what_is_read_or_written_otherwise_stays(make: Any) -> None:
    model = nets.seeded(make)
    ready, done = rotated(model)
    assert not done
    assert torch.equal(ready.model.state_dict()["first.fc2.weight"], model.state_dict()["first.fc2.weight"])


@pytest.mark.parametrize("make", [Text, TiedText])
def test_words_are_rotated_where_they_are_no_head(make: Any) -> None:
    model, ids = nets.seeded(make), torch.arange(40).reshape(8, 5) % 11
    ready = cptv_ao.recipe(model, (ids,))
    assert ("residual stream" in str(ready)) == (make is Text)
    with torch.no_grad():
        torch.testing.assert_close(ready.model(ids), model(ids), rtol=1e-4, atol=1e-4)


class Towers(nn.Module):
    """Two streams, of which each norm is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Bare(), Bare()

    def forward(self, images: Tensor) -> Any:
        return self.left(images), self.right(images)


def test_each_of_two_streams_is_rotated() -> None:
    model, test = nets.seeded(Towers), images(5, seed=3)
    ready, _ = rotated(model)
    assert [str(ready).count(f"a linear layer at {side}.norm rotates back") for side in ("left", "right")] == [1, 1]
    with torch.no_grad():
        torch.testing.assert_close(ready.model(test), model(test), rtol=1e-4, atol=1e-4)


def test_without_outliers_nothing_is_rotated() -> None:
    _, done = rotated(nets.seeded(lambda: Stream(0.0)))
    assert not done


def test_what_a_rotation_may_help_is_told_of_a_quantized_model() -> None:
    _, converted = nets.quantize(nets.seeded(Rows), [images()])
    backend = open_model(converted)
    sums = {node.name for node in converted.graph.nodes if node.target is torch.ops.quantized.add}
    assert {backend.sites[name].nodes[0] for name in rotatable(backend)} == sums and len(sums) == 3
    _, converted = nets.quantize(nets.seeded(nets.ConvNet), [nets.images(4, 3, 16, 16)])
    assert not rotatable(open_model(converted))


def streams_told(float_model: nn.Module) -> list[str]:
    """What the report on a refined model says of its residual stream."""
    _, converted = nets.quantize(float_model, [images(64)])
    config = cptv_ao.RefineConfig(passes=0, gradient_steps=0)
    cptv_ao.refine(converted, [images(64)], float_model=float_model, config=config, progress=False)
    return [note for note in cptv_ao.report(converted).notes if "residual stream" in note]


def test_refine_tells_of_outliers_that_the_recipe_would_spread() -> None:
    model = nets.seeded(Rows)
    (note,) = streams_told(model)
    assert "3 of 3 sums" in note and "cptv_ao.recipe" in note
    assert not streams_told(rotated(model)[0].model), "the recipe has spread them"
    assert not streams_told(nets.seeded(lambda: Rows(0.0))), "none stands out"


@pytest.mark.parametrize("seed", range(3))
def test_a_quantized_stream_loses_less(seed: int) -> None:
    model, calibration, test = nets.seeded(Rows, seed), images(64, seed), images(64, seed + 10)
    wanted, errors = model(test).detach(), list[float]()
    for one in (model, rotated(model)[0].model):
        _, converted = nets.quantize(one, [calibration])
        cptv_ao.refine(converted, [calibration], float_model=one, config=cptv_ao.RefineConfig(passes=0), progress=False)
        errors.append(float((converted(test) - wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.filterwarnings("ignore:the float network's output is the same for all")  # it is of a token of its own
@pytest.mark.parametrize(("make", "loss"), [(Headless, "cosine"), (Stream, "kl"), (SquareHead, "kl")])
def test_what_rotates_back_makes_no_logits(make: Any, loss: str) -> None:
    ready, _ = rotated(nets.seeded(make))
    _, converted = nets.quantize(ready.model, [images(32)])
    config = cptv_ao.RefineConfig(max_evaluations=1, gradient_steps=0, passes=0)
    cptv_ao.refine(converted, [images(32)] * 2, float_model=ready.model, config=config, progress=False)
    assert cptv_ao.report(converted).loss == loss
