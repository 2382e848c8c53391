"""Scale and zero_point: checked, compared, made from a range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.fake_store import activation, qparams, weight

from cptv_ao.core.errors import InvalidScaleError
from cptv_ao.core.qparams import QParams, qparams_for_range, rescaled, same

SITE = activation("a")


def test_a_scale_is_kept_as_a_state_dict_can() -> None:
    found = qparams(0.1, SITE).checked(SITE)
    assert float(found.scale) == float(torch.tensor(0.1)) != 0.1


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf"), 1e-60])
def test_a_scale_that_no_kernel_can_use_is_refused(bad: float) -> None:
    with pytest.raises(InvalidScaleError, match="a: activation scale must be finite and > 0") as told:
        qparams(bad, SITE).checked(SITE)
    assert told.value.site == "a"
    scales = torch.tensor([0.1, bad, 0.1]).double()
    with pytest.raises(InvalidScaleError, match="in channel 1"):
        QParams(scales, torch.zeros(3, dtype=torch.int64)).checked(weight("w", 3))


def test_a_zero_point_outside_the_codes_and_a_wrong_shape_are_refused() -> None:
    with pytest.raises(InvalidScaleError, match=r"zero_point must be in 0\.\.255, got 256"):
        qparams(0.1, SITE, 256).checked(SITE)
    with pytest.raises(InvalidScaleError, match=r"expected scale and zero_point of shape \(3,\)"):
        qparams(0.1, SITE).checked(weight("w", 3))


def test_same_is_what_makes_the_same_codes() -> None:
    one = qparams(0.1, SITE)
    assert same(one, qparams(0.1, SITE))
    assert not same(one, qparams(0.2, SITE)) and not same(one, qparams(0.1, SITE, 1))
    assert same(one, replace(one, shift=torch.zeros(3, dtype=torch.int8))), "none is all zero"
    assert not same(one, replace(one, shift=torch.ones(3, dtype=torch.int8)))
    assert not same(one, replace(one, correction=torch.ones(3)))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 3.0), (-2.0, 0.0)])
def test_a_range_is_held(low: float, high: float) -> None:
    found = qparams_for_range(low, high, SITE)
    step, zero = float(found.scale), int(found.zero_point)
    assert (0 - zero) * step == pytest.approx(low, abs=step / 2)
    assert (255 - zero) * step == pytest.approx(high, abs=step / 2)
    assert float(qparams_for_range(low, high, SITE, 127).scale) == pytest.approx(step * 255 / 127)


def test_a_rescaled_range_keeps_its_lower_end() -> None:
    given = qparams(0.1, SITE, 100)
    wider = rescaled(given, 2.0, SITE)
    assert float(wider.scale) == 0.2 and int(wider.zero_point) == 50
    assert pytest.approx((0 - 100) * 0.1) == (0 - 50) * 0.2
    assert int(rescaled(given, 0.25, SITE).zero_point) == 255, "clamped"
