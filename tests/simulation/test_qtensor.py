"""Quantized values of the twin, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cptv_ao.simulation.qtensor import QTensor, Rounding, from_kernel, straight_through_round

VALUES = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2


def made(codes: Tensor, scale: float = 0.05, zero_point: float = 40.0, rounding: Rounding = "round") -> QTensor:
    return QTensor(codes, torch.tensor(scale), torch.tensor(zero_point), 0, 255, rounding)


def test_codes_are_those_of_torch() -> None:
    wanted = torch.quantize_per_tensor(VALUES, 0.05, 40, torch.quint8)
    found = made(torch.zeros(1)).fitted(VALUES / 0.05)
    assert torch.equal(found.codes + 40, wanted.int_repr().float())
    assert 0 in wanted.int_repr(), "some are clipped"
    assert torch.equal(found.dequantize(), wanted.dequantize())
    taken = from_kernel(wanted)
    assert torch.equal(taken.codes, found.codes) and (float(taken.zero_point), taken.low, taken.high) == (40, 0, 255)


def test_on_other_qparams_it_is_what_torch_quantizes_anew() -> None:
    given = made(torch.zeros(1)).fitted(VALUES / 0.05)
    found = given.requantized(made(torch.zeros(1), 0.1, 10.0))
    wanted = torch.quantize_per_tensor(given.dequantize(), 0.1, 10, torch.quint8).int_repr()
    off = (found.codes + 10 - wanted).abs()
    assert float(off.max()) <= 1 and float((off > 0).float().mean()) < 0.3, "ties may go either way"


@pytest.mark.parametrize(
    ("rounding", "wanted"),
    [("round", [-40, 0, 0, 2, 215]), ("clamp", [-40, 0.4, 0.5, 1.5, 215]), ("none", [-90, 0.4, 0.5, 1.5, 300])],
)
def test_what_rounds_and_what_clamps(rounding: Rounding, wanted: list[float]) -> None:
    steps = torch.tensor([-90.0, 0.4, 0.5, 1.5, 300.0])
    assert made(steps, rounding=rounding).fitted(steps).codes.tolist() == pytest.approx(wanted)
    relu = made(steps, rounding=rounding).limits(relu=True).fit(steps)
    assert relu.tolist() == pytest.approx([max(code, 0) for code in wanted])


def test_the_gradient_is_straight_through_inside_and_goes_to_the_zero_point_at_the_ends() -> None:
    steps = torch.tensor([-90.0, 0.4, 300.0, 10.0], requires_grad=True)
    zero_point = torch.tensor(40.0, requires_grad=True)
    value = QTensor(torch.zeros(4), torch.tensor(0.05), zero_point, 0, 255, "round").fitted(steps)
    value.codes.sum().backward()
    assert steps.grad is not None and steps.grad.tolist() == [0, 1, 0, 1]
    assert zero_point.grad is not None and float(zero_point.grad) == -2, "each clipped code is an end less zero_point"
    x = torch.tensor([0.5, 1.5, -0.2], requires_grad=True)
    rounded = straight_through_round(x)
    rounded.sum().backward()
    assert rounded.tolist() == [0, 2, 0] and x.grad is not None and x.grad.tolist() == [1, 1, 1]
