"""From a float weight to its codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.fake_store import qparams, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from cptv_ao.core.qparams import SHIFT_PARTS, QParams
from cptv_ao.core.weight_rounding import count_shifted, round_weight, shift_of

SITE = weight("w", 2)
W3 = replace(weight("w", 3), qmin=-4, qmax=3)
WEIGHT = torch.tensor([[0.04, 0.05, -0.15, 5.0], [0.26, -5.0, 0.0, 0.0]])
QPARAMS = QParams(torch.tensor([0.1, 0.5], dtype=torch.float64), torch.tensor([0, 1]))


def random_weight(rows: int = 2, columns: int = 200) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 5


def test_codes_are_rounded_by_channel_and_clamped() -> None:
    codes = round_weight(WEIGHT, QPARAMS, SITE)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[0, 0, -2, 7], [2, -8, 1, 1]], "halves to even, as the kernels do"


def test_a_whole_weight_has_one_scale() -> None:
    site = weight("w", 1)
    whole = QParams(torch.tensor(0.1).double(), torch.tensor(0))
    per_tensor = replace(site, shape=(), axis=None)
    assert round_weight(WEIGHT, whole, per_tensor).tolist() == [[0, 0, -2, 7], [3, -8, 0, 0]]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), zero_point=st.integers(-1, 1))
def test_a_shift_brings_back_any_codes_that_are_a_step_away(seed: int, zero_point: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator)
    scale = 0.2 + torch.rand(3, generator=generator).double()
    nearest = QParams(scale.float().double(), torch.full((3,), zero_point))
    steps = weight / nearest.scale.float()[:, None] + zero_point
    way = torch.rand(weight.shape, generator=generator) < 0.5
    codes = torch.where(way, steps.floor(), steps.ceil()).clamp(W3.qmin, W3.qmax).to(torch.int8)
    shift = shift_of(weight, codes, nearest, W3)
    assert shift is not None
    assert torch.equal(round_weight(weight, replace(nearest, shift=shift), W3), codes)
    assert shift_of(weight, round_weight(weight, nearest, W3), nearest, W3) is None


def test_codes_hardly_beyond_a_tie_are_kept_too() -> None:
    """Or they would turn where the very scales are written again that they have."""
    scales = QParams(torch.ones(2).double(), torch.zeros(2).long())
    weight = torch.tensor([[-2.50127, 1.4999, 0.3], [2.499, -0.5001, 1.0]])
    codes = torch.tensor([[-2, 2, 0], [3, 0, 1]], dtype=torch.int8)
    shift = shift_of(weight, codes, scales, W3)
    assert shift is not None and int(shift.abs().max()) < SHIFT_PARTS // 8
    assert torch.equal(round_weight(weight, replace(scales, shift=shift), W3), codes)


def test_codes_beyond_the_nominal_range_need_no_shift() -> None:
    """convert_fx gives +4 at W3, which is clamped to 3 when it is written."""
    weight = torch.tensor([[4.0, -4.0, 1.2], [0.4, 3.9, 0.0], [2.0, 1.0, -1.0]])
    qparams = QParams(torch.ones(3).double(), torch.zeros(3).long())
    assert shift_of(weight, weight.round().to(torch.int8), qparams, W3) is None


def test_the_nearest_codes_need_no_shift_and_others_are_counted() -> None:
    values = random_weight()
    nearest = round_weight(values, qparams(0.1, SITE), SITE)
    assert shift_of(values, nearest, qparams(0.1, SITE), SITE) is None
    assert count_shifted(values, qparams(0.1, SITE), SITE) == 0
    turned = replace(qparams(0.1, SITE), shift=torch.full((2, 200), SHIFT_PARTS // 2, dtype=torch.int8))
    up = torch.round(values / 0.1 + 0.5).clamp(-8, 7)
    assert count_shifted(values, turned, SITE) == int((up != nearest).sum()) > 100
