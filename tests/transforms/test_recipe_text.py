"""The recipe on what text encoders do: masks, outputs of a class of their own, decisions by the numbers in a mask."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import nets
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao

WIDTH, TOKENS = 16, 6
ROWS = torch.randn(8, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(TOKENS) < torch.tensor([6, 3, 4, 6, 2, 5, 6, 3])[:, None]).long()  # (8, TOKENS), 1: is seen
WHOLE = torch.ones_like(MASK)


class Attention(nn.Module):
    """One head whose scores are masked before their softmax."""

    def __init__(self, masked: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj, self.softmax, self.drop = nn.Linear(WIDTH, WIDTH), nn.Softmax(-1), nn.Dropout(0.1)
        window = torch.zeros(TOKENS, TOKENS)
        window[:3, 3:] = window[3:, :3] = -100.0
        self.register_buffer("window", window)
        self.register_buffer("lowest", torch.tensor(torch.finfo(torch.float32).min))
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = 4.0 * self.q(x) @ self.k(x).transpose(1, 2)
        return self.proj(self.masked(self, scores, mask) @ self.v(x)).mean(1)


def _lowest(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    far = torch.where(mask[:, None, :].bool(), torch.tensor(0.0), torch.finfo(torch.float32).min)
    return own.drop(functional.softmax(scores + far, dim=-1))


def _scaled(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    return own.softmax((scores + (1.0 - mask[:, None, :].float()) * -10000.0).clone())


def _filled(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask[:, None, :] == 0, -torch.inf).softmax(-1)


def _taken_off(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    return own.softmax(scores - 1e4 * (1 - mask[:, None, :]).float())


def _chosen(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    return own.softmax(torch.where(mask[:, None, :] == 1, scores, own.lowest))


def _shifted_windows(own: Any, scores: Tensor, mask: Tensor) -> Tensor:
    return own.softmax(scores + own.window)


@pytest.mark.parametrize("masked", [_lowest, _scaled, _taken_off, _filled, _chosen, _shifted_windows])
@pytest.mark.parametrize("example", [MASK, WHOLE], ids=["padded", "whole"])
def test_no_range_has_to_hold_a_mask(masked: Any, example: Tensor) -> None:
    model = nets.seeded(lambda: Attention(masked))
    ready = cptv_ao.recipe(model, (ROWS, example))
    quantized = converted(ready, ROWS, example, MASK)
    assert [name for name, m in quantized.named_modules() if type(m) is nn.Linear] == []
    expected = model(ROWS, MASK)
    assert (quantized(ROWS, MASK) - expected).norm() < 0.1 * expected.norm()


@dataclass
class Outputs(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of transformers: a dict, and a dataclass."""

    last: Tensor | None = None
    other: Tensor | None = None

    def __post_init__(self) -> None:
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Encoder(nn.Module):
    """With control flow on the form of its input, and maybe on the numbers in its mask."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.fc, self.looks = nn.Linear(WIDTH, WIDTH), looks

    def forward(self, x: Tensor, mask: Tensor, size: tuple[int, int]) -> Outputs:
        if min(size) > 2 and size[0] % 2 == 0:
            x = self.fc(x)
        if not (self.looks and mask.all()):
            x = x * mask.unsqueeze(-1)
        return Outputs(last=x)


class Pooled(nn.Module):
    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(looks), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, mask, x.shape[1:]).last.mean(1))


def test_a_module_that_returns_a_dict_with_attributes_is_rewritten_into_one() -> None:
    model = nets.seeded(lambda: Pooled(False))
    ready = cptv_ao.recipe(model, (ROWS, MASK))
    assert "Encoder (1 module) rewritten" in ready.notes[0]
    torch.testing.assert_close(ready.model(ROWS[:3], MASK[:3]), model(ROWS[:3], MASK[:3]))
    assert type(ready.model.get_submodule("encoder")(ROWS, MASK, ROWS.shape[1:])) is Outputs
    assert type(converted(ready, ROWS, MASK).get_submodule("encoder.fc")) is not nn.Linear


def test_what_hangs_on_the_numbers_of_an_input_is_not_decided_by_the_example() -> None:
    model = nets.seeded(lambda: Pooled(True))
    ready = cptv_ao.recipe(model, (ROWS, WHOLE))
    assert ready.notes[0].startswith("Encoder (1 module) stays float: ")
    assert "hangs on the numbers in its inputs" in ready.notes[0]
    for mask in (WHOLE, MASK):
        torch.testing.assert_close(ready.model(ROWS, mask), model(ROWS, mask))


def converted(ready: cptv_ao.Recipe, rows: Tensor, *masks: Tensor) -> GraphModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        custom, example = ready.prepare_custom_config, (rows, masks[0])
        prepared = prepare_fx(ready.model, ready.qconfig_mapping, example, prepare_custom_config=custom)
        for mask in masks:
            prepared(rows, mask)
        return convert_fx(prepared)
