"""Fixtures: trained and random networks, quantized once per session and copied for each test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

torch.set_num_threads(1)
pytest.register_assert_rewrite("helpers")

import helpers  # noqa: F401 - it puts examples/ on the path, for workloads
import workloads
from helpers import nets, pt2e, shipping
from helpers.cases import Case, Copies, vit_case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks are forked, which torch does not survive once a process has exported a model: their tests come first, with
    pytest-xdist too if it leaves the order as it is (`--no-loadscope-reorder`). What lies in tests/slow is slow, and
    begins early, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: (item.path.stem != "test_distributed", item.path.parent.name != "slow"))
    for item in items:
        if item.path.parent.name == "slow":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _own_engine() -> Iterator[None]:
    engine = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = engine


@pytest.fixture(scope="session")
def digits() -> workloads.Images:
    return workloads.digits()


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    """The trained ViT of the digits, float."""
    pytest.importorskip("timm", reason="its blocks are timm's")
    return workloads.trained("digits_vit")


@pytest.fixture(scope="session")
def _vit_w3(vit: nn.Module, digits: workloads.Images) -> Case:
    return vit_case(vit, digits, 3)


@pytest.fixture(scope="session")
def _vit_w2(vit: nn.Module, digits: workloads.Images) -> Case:
    return vit_case(vit, digits, 2)


@pytest.fixture
def vit_w3(_vit_w3: Case) -> Case:
    return _vit_w3.copy()


@pytest.fixture
def vit_w2(_vit_w2: Case) -> Case:
    return _vit_w2.copy()


def _small_case(make: type[nn.Module], size: int, per_tensor: bool) -> Case:
    model = nets.seeded(make)
    batches = list(nets.images(16, 3, size, size).split(4))
    prepared, converted = nets.quantize(model, batches, weight_bits=3, per_tensor=per_tensor)
    return Case(model, prepared, converted, batches)


_SMALL: dict[str, Callable[[], Case]] = {
    "conv": lambda: _small_case(nets.ConvNet, 16, False),
    "conv per tensor": lambda: _small_case(nets.ConvNet, 16, True),
    "functional": lambda: _small_case(nets.FunctionalNet, 8, False),
    "functional per tensor": lambda: _small_case(nets.FunctionalNet, 8, True),
}


@pytest.fixture(scope="session")
def small_cases() -> Copies:
    """Of the small networks."""
    return Copies(_SMALL)


def _or_slow(*quick: str, others: Iterable[str]) -> list[Any]:
    """Parameters, of which these alone are tried without `slow`."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in others if name not in quick)]


@pytest.fixture(params=_or_slow("conv", "functional", others=_SMALL))
def small(request: pytest.FixtureRequest, small_cases: Copies) -> Case:
    """Each of the small networks, at W3A8."""
    return small_cases[request.param]


@pytest.fixture
def conv(small_cases: Copies) -> Case:
    return small_cases["conv"]


@pytest.fixture
def functional(small_cases: Copies) -> Case:
    return small_cases["functional"]


@pytest.fixture(params=_or_slow("conv", "functional", others=[*_SMALL, "vit"]))
def case(request: pytest.FixtureRequest, small_cases: Copies) -> Case:
    """Each of the small networks and the ViT, at W3A8."""
    if request.param == "vit":
        return request.getfixturevalue("_vit_w3").copy()
    return small_cases[request.param]


@pytest.fixture(scope="session")
def tokens() -> nn.Module:
    """A small ViT with a class token, float."""
    return nets.seeded(shipping.Tokens)


@pytest.fixture(scope="session")
def _tokens_x86(tokens: nn.Module) -> GraphModule:
    return pt2e.converted(tokens, pt2e.x86(), fold=True, batches=shipping.BATCHES)


@pytest.fixture
def tokens_x86(_tokens_x86: GraphModule) -> GraphModule:
    """It as a PT2E graph."""
    return copy.deepcopy(_tokens_x86)
