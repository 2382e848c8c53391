"""Loaders as they are: batches of another size than was exported, several inputs, padded sequences, integers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.search import small_config
from helpers.state import weights
from torch import Tensor, nn
from torch.ao.quantization import float_qparams_weight_only_qconfig
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.diagnosis.code_counts import count_codes


class Conv(nn.Module):
    """Two convolutions; takes integers, too, where it is told to."""

    def __init__(self, integers: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.integers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), integers

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if self.integers else x
        return self.b(self.a(x).relu()).mean((2, 3))


class Two(nn.Module):
    """Needs two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(y)).relu())


class Tokens(nn.Module):
    """Of token ids (N, L): classes of each token, or of each sequence."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.embed, self.a, self.norm = nn.Embedding(50, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head, self.pooled = nn.Linear(16, 5), pooled

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.a(self.embed(ids)).relu())
        return self.head(x.mean(1) if self.pooled else x)


def exported(model: nn.Module, example: tuple[Any, ...], dynamic: Any = None) -> GraphModule:
    """A PT2E graph that was calibrated to ranges that are too wide."""
    torchao = pt2e.torchao()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = torch.export.export(copy.deepcopy(model), example, dynamic_shapes=dynamic).module()
        prepared = torchao.prepare_pt2e(graph, pt2e.xnnpack())
        prepared(*(3 * value if value.is_floating_point() else value for value in example))
        return torchao.convert_pt2e(prepared)


def refined(model: GraphModule, loader: Any, float_model: nn.Module, **changes: Any) -> tuple[Any, GraphModule]:
    """The report on a copy, and that copy."""
    config = small_config(**({"evaluations": 8, "gradient_steps": 12} | changes))
    found = cptv_ao.refine(copy.deepcopy(model), loader, float_model=float_model, config=config, progress=False)
    return cptv_ao.report(found), found


# Graphs that were exported for one number of images


def test_a_graph_of_one_image_is_given_them_one_by_one() -> None:
    float_model, images = nets.seeded(Conv), nets.images(16, 3, 8, 8)
    model = exported(float_model, (images[:1],))
    report, found = refined(model, list(images.split(8)), float_model)
    _, alone = refined(model, list(images.split(1)), float_model)
    assert report.images == (12, 4) and report.after.search < report.before.search
    assert weights(found) == weights(alone), "as if the loader had given them alone"
    whole = cptv_ao.diagnose(model, list(images.split(8)), float_model=float_model, progress=False)
    assert whole == cptv_ao.diagnose(model, list(images.split(1)), float_model=float_model, progress=False)
    site = next(site.name for site in cptv_ao.find_sites(model).values() if site.kind == "activation")
    assert count_codes(model, site, [images]).total == images.numel()


def test_a_graph_of_four_images_is_given_four() -> None:
    float_model, images = nets.seeded(Conv), nets.images(30, 3, 8, 8)
    model = exported(float_model, (images[:4],))
    with pytest.warns(cptv_ao.CptvWarning, match="the last 2 images are left out, .* for batches of 4") as told:
        report, _ = refined(model, list(images.split(10)), float_model)
    assert [warning.filename for warning in told if warning.category is cptv_ao.CptvWarning] == [__file__]
    assert report.images == (20, 8) and report.after.search < report.before.search
    with pytest.raises(cptv_ao.CalibrationDataError, match="expected at least 4 images"):
        refined(model, [images[:3]], float_model)
    with pytest.raises(cptv_ao.CalibrationDataError, match="expected an input of 4 dimensions"):
        refined(model, list(images), float_model)


# Several inputs


def test_a_tuple_holds_as_many_inputs_as_the_model_needs() -> None:
    float_model, a, b = nets.seeded(Two), nets.images(24, 6).split(6), nets.images(24, 4, seed=1).split(6)
    pairs = list(zip(a, b, strict=True))
    for model in (nets.quantize(float_model, pairs, weight_bits=3)[1], exported(float_model, pairs[0])):
        report, found = refined(model, [{"x": x, "y": y, "label": 0} for x, y in pairs], float_model)
        assert report.after.search < report.before.search
        for loader in (pairs, [[*pair, "label"] for pair in pairs], [({"x": x, "y": y}, "label") for x, y in pairs]):
            assert weights(refined(model, loader, float_model)[1]) == weights(found)
        with pytest.raises(cptv_ao.CalibrationDataError, match=r"expected the 2 inputs of the model \(x, y\), got 1"):
            refined(model, list(a), float_model)
        given = cptv_ao.diagnose(model, pairs, float_model=float_model, progress=False)
        assert given.images == 24 and given.blocks[0].share > 0.5


# Sequences that are padded to the longest of their batch


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (8, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("pooled", [True, False])
def test_batches_have_lengths_of_their_own(pooled: bool) -> None:
    float_model, batches = nets.seeded(lambda: Tokens(pooled)), sequences(5, 9, 7, 12, 6, 5)
    mapping = nets.mapping(3).set_object_type(nn.Embedding, float_qparams_weight_only_qconfig)
    _, model = nets.quantize(float_model, batches, mapping=mapping)
    report, found = refined(model, batches, float_model, loss="mse", population=("output_error", "ranges"))
    assert report.images == (32, 16)
    with torch.no_grad():
        losses = [[float((m(b) - float_model(b)).square().mean()) for b in batches[:4]] for m in (model, found)]
    before, after = (sum(loss) / 4 for loss in losses)
    assert (report.before.search, report.after.search) == pytest.approx((before, after), rel=1e-4), "a mean per batch"
    assert after < 0.8 * before
    diagnosis = cptv_ao.diagnose(model, batches, float_model=float_model, progress=False)
    assert diagnosis.images == 48 and diagnosis.floor is not None and diagnosis.floor < 0.01 * diagnosis.loss


def test_lengths_that_a_graph_was_not_exported_for_are_told() -> None:
    float_model, batches = nets.seeded(lambda: Tokens(True)), sequences(5, 9, 5)
    images, length = torch.export.Dim("images", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    report, _ = refined(exported(float_model, (batches[0],), ({0: images, 1: length},)), batches, float_model)
    assert report.images == (16, 8)
    with pytest.raises(cptv_ao.CalibrationDataError, match=r"batch 1: .*; it was exported for other shapes: export it"):
        refined(exported(float_model, (batches[0],), ({0: images},)), batches, float_model)


def test_the_batch_that_a_model_does_not_take_is_named() -> None:
    float_model = nets.seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    _, model = nets.quantize(float_model, [nets.images(4, 12)])
    match = r"batch 2: expected images of shape \(12,\) .* as in batch 0, got \(13,\) .* does not take: mat1 and mat2"
    with pytest.raises(cptv_ao.CalibrationDataError, match=match):
        refined(model, [nets.images(4, 12), nets.images(4, 12), nets.images(4, 13)], float_model)


# Integers, images alone, autocast, sparse tensors


def test_integers_are_taken_where_the_model_takes_them(conv: Any) -> None:
    float_model = nets.seeded(lambda: Conv(integers=True))
    batches = [(60 * batch).clamp(0, 255).to(torch.uint8) for batch in nets.images(24, 3, 8, 8).split(6)]
    _, model = nets.quantize(float_model, batches, weight_bits=3)
    report, _ = refined(model, batches, float_model)
    assert report.after.search < report.before.search
    assert cptv_ao.diagnose(model, batches, float_model=float_model, progress=False).images == 24
    for kind in (torch.uint8, torch.float16, torch.float64):
        with pytest.raises(cptv_ao.CalibrationDataError, match=f"it takes them as torch.float32, got {kind}: give"):
            refined(conv.converted, [batch.to(kind) for batch in conv.batches], conv.float_model)


@pytest.mark.parametrize("labelled", [False, True])
def test_images_alone_are_refused(conv: Any, labelled: bool) -> None:
    alone = [(image, 3) if labelled else image for batch in conv.batches for image in batch]
    with pytest.raises(
        cptv_ao.CalibrationDataError, match=r"batch 0: .*: give batches \(N, \.\.\.\), of one image.unsq"
    ):
        refined(conv.converted, alone, conv.float_model)


def test_vectors_alone_are_refused() -> None:
    """A float linear layer takes them, and so would the search."""
    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))
    vectors = nets.images(24, 12)
    _, model = nets.quantize(float_model, [vectors], weight_bits=3)
    match = r"batch 0: expected a batch dimension, got an input of shape \(12,\), .* output is of shape \(5,\)"
    for verb in (cptv_ao.refine, cptv_ao.diagnose):
        with pytest.raises(cptv_ao.CalibrationDataError, match=match):
            verb(model, list(vectors), float_model=float_model, progress=False)


def test_autocast_around_the_call_changes_nothing(conv: Any) -> None:
    _, wanted = refined(conv.converted, conv.batches, conv.float_model)
    diagnosis = cptv_ao.diagnose(conv.converted, conv.batches, float_model=conv.float_model, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = refined(conv.converted, conv.batches, conv.float_model)
        again = cptv_ao.diagnose(conv.converted, conv.batches, float_model=conv.float_model, progress=False)
    assert weights(found) == weights(wanted) and str(again) == str(diagnosis)
