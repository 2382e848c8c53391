"""Random directions see of a small change of the outputs what the loss sees."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import nets
from helpers.state import in_double

from cptv_ao.core.loss_curvature import random_direction
from cptv_ao.core.losses import LOSSES

IMAGES, NUMBERS, DRAWS = 3, 6, 20_000


@pytest.mark.parametrize(("loss", "factor"), [("kl", 1.0), ("cosine", 1.0), ("mse", NUMBERS / 2)])
def test_the_squares_are_twice_the_loss(loss: str, factor: float) -> None:
    """On average, of each image, with one factor for all; `mse` is a mean over the numbers."""
    teacher = 2 * nets.images(IMAGES, NUMBERS, seed=1).double()
    change = 1e-3 * nets.images(IMAGES, NUMBERS, seed=2).double()
    outputs = teacher.repeat(DRAWS, 1).requires_grad_()
    number = random_direction(loss, outputs, torch.Generator().manual_seed(0))
    (directions,) = torch.autograd.grad(number, outputs)
    seen = (directions * change.repeat(DRAWS, 1)).sum(1).square().reshape(DRAWS, IMAGES).mean(0)
    expected = [
        2 * factor * float(LOSSES[loss](y + d, y)) for y, d in zip(teacher.split(1), change.split(1), strict=True)
    ]
    assert seen.tolist() == pytest.approx(expected, rel=0.06)


def test_a_change_that_the_loss_does_not_see_is_not_followed() -> None:
    """All logits by as much, and the length of an embedding."""
    for loss, change in (("kl", torch.ones(1, NUMBERS)), ("cosine", nets.images(1, NUMBERS, seed=3))):
        outputs = nets.images(1, NUMBERS, seed=3).requires_grad_()
        number = random_direction(loss, outputs, torch.Generator().manual_seed(1))
        (direction,) = torch.autograd.grad(number, outputs)
        assert float(direction.abs().max()) > 1e-2
        assert float((direction * change).sum()) == pytest.approx(0.0, abs=1e-6)


def test_the_default_dtype_draws_no_other_direction() -> None:
    outputs, found = nets.images(IMAGES, NUMBERS).requires_grad_(), []
    for around in (nullcontext(), in_double()):
        with around:
            number = random_direction("mse", outputs, torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(number, outputs)[0])
    assert torch.equal(*found)
