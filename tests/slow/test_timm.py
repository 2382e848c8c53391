"""timm's models with random weights through stock torch.ao: they say that it runs, not how accurate it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from torch import nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.blocks import find_blocks

timm = pytest.importorskip("timm")

VIT_BLOCKS = ["stem", *(f"blocks.{i}" for i in range(12)), "head"]
BLOCKS = {
    "deit_tiny_patch16_224": VIT_BLOCKS,
    "swin_tiny_patch4_window7_224": [
        *("stem", "layers.0.blocks.0", "layers.0.blocks.1"),
        *("layers.1.downsample", "layers.1.blocks.0", "layers.1.blocks.1"),
        *("layers.2.downsample", *(f"layers.2.blocks.{i}" for i in range(6))),
        *("layers.3.downsample", "layers.3.blocks.0", "layers.3.blocks.1", "head"),
    ],
    "levit_128s": [
        *("stem", "stages.0.blocks.0", "stages.0.blocks.1"),
        *("stages.1.downsample", *(f"stages.1.blocks.{i}" for i in range(3))),
        *("stages.2.downsample", *(f"stages.2.blocks.{i}" for i in range(4)), "head"),
    ],
    "resnet18": ["stem", *(f"layer{stage}.{i}" for stage in range(1, 5) for i in range(2)), "head"],
}
SITES = {
    "deit_tiny_patch16_224": 202,
    "swin_tiny_patch4_window7_224": 301,
    "levit_128s": 277,
    "resnet18": 52,
}
ENGINES = ["x86", "fbgemm", "onednn", "qnnpack"]
# Swin takes as long as all others: fbgemm and onednn, whose kernels are those of x86, are tried on these.
SETTINGS = [
    (name, engine) for name in SITES for engine in ENGINES if "swin" not in name or engine in ("x86", "qnnpack")
]
BATCHES = [nets.images(1, 3, 224, 224, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module", params=SETTINGS, ids="-".join)
def setting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A network and an engine."""
    name, engine = request.param
    return name, engine


@pytest.fixture(scope="module")
def name(setting: tuple[str, str]) -> str:
    return setting[0]


@cache
def made(name: str) -> nn.Module:
    # qnnpack adds no scales that are 2^14 apart: resnet18 needs random batch norms for that, levit the initial ones.
    return nets.seeded(lambda: timm.create_model(name), random_norms=name == "resnet18")


@pytest.fixture(scope="module")
def float_model(name: str) -> nn.Module:
    return made(name)


@pytest.fixture(scope="module")
def engine(setting: tuple[str, str]) -> Iterator[str]:
    before, wanted = torch.backends.quantized.engine, setting[1]
    if wanted not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch was built without {wanted}")
    torch.backends.quantized.engine = wanted
    yield wanted
    torch.backends.quantized.engine = before


@pytest.fixture(scope="module")
def converted(engine: str, float_model: nn.Module) -> GraphModule:
    _, model = nets.quantize(float_model, BATCHES, engine=engine)
    return model


def test_every_scale_is_found_and_in_one_block(name: str, converted: GraphModule) -> None:
    sites = cptv_ao.find_sites(converted)
    assert sites.unknown == ()
    assert len(sites) == SITES[name]
    blocks = find_blocks(sites.values())
    assert [block.name for block in blocks] == BLOCKS[name]
    assert sorted(s.name for block in blocks for s in block.sites) == sorted(sites)
    fixed = {site.op for site in sites.values() if site.fixed}
    assert fixed == ({"Softmax"} if "swin" in name else set())


def check_refine(model: GraphModule, float_model: nn.Module | None, **changes: Any) -> None:
    config = small_config(evaluations=1, max_evaluations=5, **changes)
    refined = cptv_ao.refine(model, BATCHES, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(refined)
    assert refined is model
    assert report.after.search <= report.before.search
    assert report.after.holdout is not None and report.before.holdout is not None
    assert report.after.holdout <= report.before.holdout
    assert 0 < report.evaluations <= 5
    with torch.inference_mode():
        assert bool(torch.isfinite(refined(BATCHES[0])).all())


def test_refine_runs_and_is_never_worse(float_model: nn.Module, converted: GraphModule, engine: str) -> None:
    population = ("output_error", "ranges") if engine == "x86" else ()  # slow, and the same on every engine
    check_refine(copy.deepcopy(converted), float_model, population=population)


@pytest.mark.parametrize("setting", [(name, "x86") for name in SITES], indirect=True, ids="-".join)
def test_refine_runs_without_the_float_model(converted: GraphModule) -> None:
    with pytest.warns(cptv_ao.CptvWarning, match="without float_model"):
        check_refine(copy.deepcopy(converted), None)
