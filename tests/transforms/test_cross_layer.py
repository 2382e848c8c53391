"""Channels brought to like ranges from layer to layer: the same function in float, less rounding, found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of, error, in_float
from helpers.search import small_config
from torch import Tensor, nn
from torch.nn import functional

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.channel_scaling import power_exponents
from cptv_ao.core.weight_rounding import HALF_STEP
from cptv_ao.transforms.channel_groups import ChannelGroups, columns_of
from cptv_ao.transforms.equalize import equalize


class Chain(nn.Module):
    """Convolutions with ReLU6, a depthwise one; a residual sum; a pool; linear layers behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.wide, self.thin = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        x = self.narrow(functional.relu(self.depthwise(x)))
        x = x + self.thin(functional.relu(self.wide(x)))
        x = functional.adaptive_avg_pool2d(functional.relu(x), 2).flatten(1)
        return self.fc2(functional.relu(self.fc1(x)))


def chain() -> nn.Module:
    """Its channels lie apart: those of each layer by up to a factor of 20, given back in the one behind it."""
    model: Any = nets.seeded(Chain)
    with torch.no_grad():
        for layer in model.children():
            layer.weight.mul_(2.5)
        for layer, factors in (
            (model.stem, torch.logspace(-1.3, 0, 8)),
            (model.depthwise, torch.logspace(0, -1.3, 8)),
            (model.wide, torch.logspace(-1.3, 0, 16)),
            (model.fc1, torch.logspace(0, -1.3, 12)),
        ):
            layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.mul_(factors)
        model.depthwise.weight.div_(torch.logspace(-1.3, 0, 8).reshape(8, 1, 1, 1))
        model.narrow.weight.div_(torch.logspace(0, -1.3, 8).reshape(1, 8, 1, 1))
        model.fc2.weight.div_(torch.logspace(0, -1.3, 12))
        model.thin.weight.div_(torch.logspace(-1.3, 0, 16).reshape(1, 16, 1, 1))
    return model


@pytest.fixture(scope="module")
def _case() -> Case:
    model, batches = chain(), list(nets.images(24, 3, 8, 8).split(6))
    return Case(model, *nets.quantize(model, batches), batches)


@pytest.fixture
def case(_case: Case) -> Case:
    return _case.copy()


def batches_of(case: Case) -> list[Batch]:
    return [Batch((images,), {}, len(images)) for images in case.batches]


def test_which_values_are_scaled_as_one(case: Case) -> None:
    groups = ChannelGroups(backend_of(case)).find()
    assert [(group.count, set(group.writers), [name for name, _ in group.readers]) for group in groups] == [
        (8, {"stem.weight"}, ["depthwise.weight"]),
        (8, {"depthwise.weight"}, ["narrow.weight"]),
        (8, {"narrow.weight", "thin.weight"}, ["wide.weight", "fc1.weight"]),
        (16, {"wide.weight"}, ["thin.weight"]),
        (12, {"fc1.weight"}, ["fc2.weight"]),
    ]
    assert groups[0].outputs[0].high == 6.0


@torch.no_grad()
def test_the_function_in_float_stays_and_roundings_are_less(case: Case) -> None:
    backend, image = backend_of(case), case.batches[0]
    before, given = in_float(backend, image), error(case.converted, case)
    *_, told = equalize(backend, batches_of(case))
    assert told.endswith("layers brought to like ranges with the layers behind them")
    torch.testing.assert_close(in_float(backend, image), before, rtol=1e-4, atol=1e-5)
    assert error(case.converted, case) < 0.6 * given
    again = in_float(backend_of(case), image)  # weights are found again by their codes
    torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_depthwise_layer_and_what_is_before_it_keep_their_codes(case: Case) -> None:
    backend = backend_of(case)
    names = ("stem.weight", "depthwise.weight", "wide.weight")
    before = {name: (backend.weight(name).int_repr(), backend.read(name).scale) for name in names}
    equalize(backend, batches_of(case))
    for name in names[:2]:
        assert torch.equal(backend.weight(name).int_repr(), before[name][0])
    assert not torch.equal(backend.read("stem.weight").scale, before["stem.weight"][1])


@torch.no_grad()
def test_what_reaches_the_end_of_a_relu6_is_left() -> None:
    """Six stays six."""
    model: Any = chain()
    model.stem.weight.mul_(40)
    batches = list(nets.images(24, 3, 8, 8).split(6))
    case = Case(model, *nets.quantize(model, batches), batches)
    backend = backend_of(case)
    before = backend.read("stem.weight").scale
    reached = torch.cat([functional.relu(model.stem(b)).amax((0, 2, 3))[None] for b in batches]).amax(0)
    equalize(backend, batches_of(case))
    assert bool((reached > 6).any())
    assert torch.equal(backend.read("stem.weight").scale[reached > 6], before[reached > 6])
    assert bool((backend.read("stem.weight").scale >= before).all())


class Read(nn.Module):
    """A value that somebody else sees."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), other

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        return self.second(x).sum((2, 3)) + self.other(x).mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("other", [torch.sigmoid, functional.hardswish, lambda x: x * x, lambda x: x + 1.0])
def test_what_others_read_is_left(other: Any) -> None:
    model, batches = nets.seeded(lambda: Read(other)), list(nets.images(8, 3, 8, 8).split(4))
    assert ChannelGroups(backend_of(Case(model, *nets.quantize(model, batches), batches))).find() == []


class Mixed(nn.Module):
    """A mean over the channels: what is behind it has as many columns as two channels would, and no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.conv(x)).mean(1).flatten(1))


@torch.no_grad()
def test_what_only_looks_like_channels_is_left() -> None:
    model: Any = nets.seeded(Mixed)
    model.conv.weight.mul_(torch.logspace(-1.3, 0, 8).reshape(8, 1, 1, 1))
    batches = list(nets.images(8, 3, 4, 4).split(4))
    case = Case(model, *nets.quantize(model, batches), batches)
    backend = backend_of(case)
    assert len(ChannelGroups(backend).find()) == 1
    before = in_float(backend, batches[0])
    assert not [told for told in equalize(backend, batches_of(case)) if "like ranges" in told]
    torch.testing.assert_close(in_float(backend, batches[0]), before)


def test_without_float_weights_only_depthwise_readers_are_scaled(case: Case) -> None:
    with pytest.warns(cptv_ao.CptvWarning, match="without float_model"):
        cptv_ao.refine(case.converted, case.batches, config=small_config(), progress=False)
    notes = " ".join(cptv_ao.report(case.converted).notes)
    assert "of 1 layer brought to like ranges" in notes


def test_it_is_refined_saved_loaded_and_refined_again(case: Case, tmp_path: Path) -> None:
    config, fresh, given = (
        small_config(gradient_steps=4, loss="mse"),
        case.copy().converted,
        error(case.converted, case),
    )
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    assert "brought to like ranges" in " ".join(cptv_ao.report(case.converted).notes)
    first = error(case.converted, case)
    assert first < given
    cptv_ao.save_scales(case.converted, tmp_path / "scales")
    cptv_ao.load_scales(fresh, tmp_path / "scales")
    assert torch.equal(fresh(case.batches[0]), case.converted(case.batches[0]))
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    assert error(case.converted, case) <= first * (1 + 1e-6)


def scaled_weight(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight, and the powers of two that its rows and columns are scaled by, of a shape that meets it."""
    tail = [1] * (len(shape) - 2)
    rows = torch.randint(-4, 5, (shape[0], 1, *tail), generator=generator)
    columns = torch.randint(-3, 4, (1, shape[1], *tail), generator=generator)
    return torch.randn(shape, generator=generator), (rows + columns).float()


def steps_of(weight: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """The scale of each row, in the shape of the weight, on which all its values but those beyond `clip` fit."""
    return weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1)) * clip / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize(("shape", "bits"), [((8, 6), 8), ((8, 4, 3, 3), 8), ((12, 1, 3, 3), 3), ((16, 16), 8)])
def test_powers_of_two_are_found_in_codes(shape: tuple[int, ...], bits: int) -> None:
    weight, powers = scaled_weight(shape, torch.Generator().manual_seed(0))
    scaled = weight * torch.exp2(powers)
    steps = steps_of(scaled, bits)
    found = power_exponents(weight / steps, (scaled / steps).round())
    assert torch.equal(weight * torch.exp2(found), scaled)


@pytest.mark.parametrize("clip", [0.7, 0.5, 0.35])
@pytest.mark.parametrize(("shape", "bits"), [((32, 1, 5, 5), 8), ((48, 96, 1, 1), 8), ((64, 96), 4)])
def test_rows_whose_largest_values_are_clipped_are_found_too(shape: tuple[int, ...], bits: int, clip: float) -> None:
    """Scales of least output error clip: codes at the ends are less than what they stand for, as if scaled down."""
    for seed in range(5):
        weight, powers = scaled_weight(shape, torch.Generator().manual_seed(seed))
        scaled = weight * torch.exp2(powers)
        steps, most = steps_of(scaled, bits, clip), 2 ** (bits - 1)
        codes = (scaled / steps).round().clamp(-most, most - 1)
        found = weight * torch.exp2(power_exponents(weight / steps, codes)) / steps
        clipped = ((codes == most - 1) & (found > codes)) | ((codes == -most) & (found < codes))
        assert float((found - codes).abs().masked_fill(clipped, 0.0).max()) < HALF_STEP


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_few_codes_are_not_taken_for_scaled_ones(seed: int) -> None:
    """What an observer makes of channels that training has all but switched off: codes -1, 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 48, 1, 1, generator=generator)
    columns = torch.randint(-1, 2, (1, 48, 1, 1), generator=generator)
    scaled = weight * torch.exp2(columns.float())
    steps = steps_of(scaled, 8)
    steps[::8] *= torch.tensor([85.0, 100.0, 120.0, 160.0] * 2).reshape(-1, 1, 1, 1)
    found = weight * torch.exp2(power_exponents(weight / steps, (scaled / steps).round()))
    assert float(((found - scaled) / steps).abs().max()) < 0.5


def test_columns_of_depthwise_layers_and_of_flattened_values() -> None:
    columns = columns_of(2, (4, 1, 3, 3))
    assert columns is not None and columns.tolist() == [[0], [0], [1], [1]]
    flat = columns_of(2, (1, 6))
    assert flat is not None and flat.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert columns_of(4, (2, 2, 3, 3)) is None and columns_of(4, (3, 1, 3, 3)) is None
