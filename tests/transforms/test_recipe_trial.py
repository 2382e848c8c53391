"""The recipe tries what it approves: what prepare_fx, a batch or convert_fx break on is named and stays float."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule

import cptv_ao

IMAGES = nets.images(6, 5, 8)


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 3), [between]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between[0](self.a(x)))


def split_heads(y: Tensor) -> Tensor:
    return y.view(y.size()[:-1] + (2, 4)).flatten(-2)  # noqa: RUF005


def scaled(y: Tensor) -> Tensor:
    return y * y.size(-1) ** -0.5


def in_chunks(y: Tensor) -> Tensor:
    return torch.cat(y.chunk(2, -1), -1)  # type: ignore[arg-type]


def converted(ready: cptv_ao.Recipe, example: tuple[Any, ...]) -> GraphModule:
    custom = ready.prepare_custom_config
    prepared = prepare_fx(copy.deepcopy(ready.model), ready.qconfig_mapping, example, prepare_custom_config=custom)
    prepared(*example)
    return convert_fx(prepared)


def quantized_layers(model: nn.Module) -> int:
    return sum(isinstance(module, torch.ao.nn.quantized.Linear) for module in model.modules())


@pytest.mark.parametrize(
    ("between", "named"), [(split_heads, "view"), (scaled, "mul"), (in_chunks, "cat")], ids=["size", "number", "tuple"]
)
def test_what_is_no_tensor_is_named_and_the_layers_are_quantized(
    between: Callable[[Tensor], Tensor], named: str
) -> None:
    model, images = nets.seeded(lambda: Between(between)), IMAGES.clone()
    ready = cptv_ao.recipe(model, (images,), qconfig_mapping=cptv_ao.qconfig_mapping(engine="x86"))
    assert torch.equal(images, IMAGES)
    assert named in str(ready)
    with torch.no_grad():
        quantized = converted(ready, (IMAGES,))
        assert quantized_layers(quantized) == 2
        error = (quantized(IMAGES) - model(IMAGES)).square().mean() / model(IMAGES).square().mean()
    assert error < 1e-2


def with_settings(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Fills in keyword arguments, as libraries of transformers do."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    """Its forward takes keyword arguments of any name, and a decorator gives one that has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    @with_settings
    def forward(
        self, x: Tensor, mask: Tensor | None = None, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Tensor]:
        assert not use_cache and not kwargs
        hidden = self.a(x)
        if mask is not None:
            hidden = hidden * mask
        return {"last": self.b(split_heads(hidden))}


def test_a_forward_with_keyword_arguments_is_quantized_not_left_in_float() -> None:
    model = nets.seeded(Decorated)
    ready = cptv_ao.recipe(model, (IMAGES,), qconfig_mapping=cptv_ao.qconfig_mapping(engine="x86"))
    with torch.no_grad():
        assert quantized_layers(converted(ready, (IMAGES,))) == 2
        assert torch.allclose(ready.model(IMAGES)["last"], model(IMAGES)["last"])


def test_what_is_fine_is_left_as_it_is() -> None:
    mapping = cptv_ao.qconfig_mapping(engine="x86")
    ready = cptv_ao.recipe(nets.seeded(lambda: Between(torch.relu)), (IMAGES,), qconfig_mapping=mapping)
    assert str(ready).startswith("nothing to change")


def test_what_is_tried_takes_no_search_for_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a second an observer, and as often as parts are tried."""

    def searched(*_: Any) -> Any:
        raise AssertionError("a histogram was searched")

    monkeypatch.setattr(HistogramObserver, "calculate_qparams", searched)
    mapping = cptv_ao.qconfig_mapping(4, "x86")
    ready = cptv_ao.recipe(nets.seeded(lambda: Between(torch.relu)), (IMAGES,), qconfig_mapping=mapping)
    assert ready.notes == ()
    assert type(ready.qconfig_mapping.global_qconfig.activation()) is HistogramObserver
