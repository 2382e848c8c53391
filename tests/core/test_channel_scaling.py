"""Factors of batch norms, and powers of two for outlier channels."""

from __future__ import annotations

import torch
from torch import nn

from cptv_ao.core.channel_scaling import fold_factors, outlier_exponents


def test_the_factors_are_those_of_a_batch_norm() -> None:
    norm = nn.BatchNorm1d(3).eval()
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.0]))
        norm.weight.copy_(torch.tensor([1.0, -3.0, 0.5]))
        factors = fold_factors(norm.running_var, norm.weight, norm.bias, norm.eps)
        assert torch.allclose(factors * torch.ones(1, 3), norm(torch.ones(1, 3)) - norm(torch.zeros(1, 3)))
    assert torch.allclose(fold_factors(torch.ones(2), None, None, 0.0), torch.ones(2))


def test_a_channel_that_hardly_varies_has_none() -> None:
    gains, ones = torch.tensor([1.0, 2e-4, 5e-5, 0.0]), torch.ones(4)
    assert (fold_factors(ones, gains, None, 0.0) != 0).tolist() == [True, True, False, False]
    offsets = torch.tensor([0.0, 10.0, 0.0, 0.0])
    assert (fold_factors(ones, gains, offsets, 0.0) != 0).tolist() == [True, False, False, False], "beside its offset"


def test_outliers_are_divided_down_to_the_median() -> None:
    peaks = torch.tensor([1.0, 1.0, 1.0, 16.0, 3.9, 4.1])
    columns = torch.ones(6)
    columns[0] = 64.0
    assert outlier_exponents(peaks, columns).tolist() == [0, 0, 0, 4, 0, 2]


def test_columns_of_the_weights_do_not_grow_beyond_the_largest() -> None:
    peaks, columns = torch.tensor([1.0, 1.0, 1.0, 64.0]), torch.tensor([8.0, 1.0, 1.0, 1.0])
    assert outlier_exponents(peaks, columns).tolist() == [0, 0, 0, 3], "and not 6"
    assert outlier_exponents(peaks, torch.ones(4)).tolist() == [0, 0, 0, 0]
    peaks[3] = torch.inf
    assert outlier_exponents(peaks, columns).tolist() == [0, 0, 0, 0]
