"""From a float weight to its codes."""

from __future__ import annotations

import torch
from helpers.fake_store import qparams, weight

from cptv_ao.core.qparams import SHIFT_PARTS, QParams
from cptv_ao.core.weight_rounding import count_shifted, round_weight, shift_of

SITE = weight("w", 2)
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
    per_tensor = type(site)(**{**vars(site), "shape": (), "axis": None})
    assert round_weight(WEIGHT, whole, per_tensor).tolist() == [[0, 0, -2, 7], [3, -8, 0, 0]]


def test_a_shift_turns_codes_and_is_found_again() -> None:
    values = random_weight()
    nearest = round_weight(values, qparams(0.1, SITE), SITE)
    steps = values / 0.1
    wanted = torch.where(torch.arange(200) % 3 == 0, torch.floor(steps), torch.ceil(steps)).clamp(-8, 7).char()
    shift = shift_of(values, wanted, qparams(0.1, SITE), SITE)
    assert shift is not None and shift.dtype == torch.int8
    shifted = QParams(qparams(0.1, SITE).scale, qparams(0.1, SITE).zero_point, shift)
    assert torch.equal(round_weight(values, shifted, SITE), wanted)
    turned = int((wanted != nearest).sum())
    assert count_shifted(values, shifted, SITE) == turned > 50
    assert bool((shift.abs() <= SHIFT_PARTS // 2).all())


def test_the_nearest_codes_need_no_shift() -> None:
    values = random_weight()
    nearest = round_weight(values, qparams(0.1, SITE), SITE)
    assert shift_of(values, nearest, qparams(0.1, SITE), SITE) is None
    assert count_shifted(values, qparams(0.1, SITE), SITE) == 0
