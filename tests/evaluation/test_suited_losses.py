"""Which loss a search will most likely use, as the graph and the user say before the teacher has run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import nets
from torch import nn

from cptv_ao import RefineConfig
from cptv_ao.evaluation.suited_losses import compares_classes


@pytest.mark.parametrize(("classes", "loss", "wanted"), [
    (True, "auto", True), (True, "kl", True), (True, "mse", False), (True, nn.functional.l1_loss, False),
    (False, "auto", False), (False, "kl", True),
])  # fmt: skip
def test_whether_classes_are_compared(classes: bool, loss: Any, wanted: bool) -> None:
    end = nn.Linear(8, 4) if classes else nn.LayerNorm(8)
    _, converted = nets.quantize(nn.Sequential(nn.Linear(6, 8), end), [nets.images(8, 6)])
    assert compares_classes(converted, RefineConfig(loss=loss), lambda _: False) == wanted


def test_a_layer_that_turns_makes_no_classes() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    torch.nn.init.eye_(model[1].weight)
    _, converted = nets.quantize(model, [nets.images(8, 8)])
    assert compares_classes(converted, RefineConfig(), lambda _: False)
    assert not compares_classes(converted, RefineConfig(), lambda _: True)
