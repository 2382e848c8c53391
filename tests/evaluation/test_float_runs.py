"""A float network is run on the same few images once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError
from cptv_ao.evaluation.float_runs import FloatRuns


class Counting(nn.Module):
    """Writes what it returns into a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer, self.runs = torch.zeros(8, 2), 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.runs += 1
        return self.buffer[: len(x)].copy_(x * scale)


def test_the_same_few_images_are_run_once_and_others_do_not_change_what_is_known() -> None:
    model, images = Counting(), torch.arange(16.0).reshape(8, 2)
    runs, batch = FloatRuns(model), Batch((images,), {}, 8)
    first = runs(batch.few(2), 0)
    assert torch.equal(runs(batch.rows(2, 4), 0), images[2:4])
    assert torch.equal(runs(batch.rows(0, 2), 1), images[:2]) and torch.equal(first, images[:2])
    assert model.runs == 2
    assert torch.equal(runs(batch.few(4), 0), images[:4]) and model.runs == 3


def test_what_else_is_given_counts_and_many_images_are_not_remembered() -> None:
    model, images = Counting(), torch.ones(8, 2)
    runs = FloatRuns(model)
    for scale in (1.0, 2.0, 1.0):
        assert torch.equal(runs(Batch((images[:2],), {"scale": scale}, 2), 0), images[:2] * scale)
    assert model.runs == 2
    for _ in range(2):
        runs(Batch((images,), {}, 8), 0)
    assert model.runs == 4


def test_what_the_model_does_not_take_is_told_each_time() -> None:
    runs = FloatRuns(Counting())
    for index in (3, 3):
        with pytest.raises(CalibrationDataError, match="batch 3"):
            runs(Batch((torch.ones(2, 5),), {}, 2), index)
