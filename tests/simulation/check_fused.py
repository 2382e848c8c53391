"""What a GPU computes in one pass is what plain torch computes in five. `test_fused.py` runs it, in the interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.quick import each_pair
from helpers.search import learnt, leaves_of
from torch import Tensor

from cptv_ao.core.losses import kl
from cptv_ao.core.tensors import first_floating
from cptv_ao.search.proposals.batch_gradient import BatchGradient
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.simulation import fused
from cptv_ao.simulation.limits import Limits, Rounding

pytest.importorskip("triton", reason="comes with torch builds for GPUs")


def values(shape: tuple[int, ...]) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 20
    return found.contiguous(memory_format=torch.channels_last) if found.dim() == 4 else found


MODES: list[tuple[Rounding, bool]] = [("round", False), ("round", True), ("clamp", False), ("none", True)]
SHAPES = [(5, 7, 33), (3, 4, 6, 6), (40, 130), (4097,)]


@pytest.mark.parametrize(("mode", "shape", "by_channel"), each_pair(MODES, SHAPES, [True, False]))
def test_codes_and_all_sums_are_those_of_plain_torch(
    mode: tuple[Rounding, bool], shape: tuple[int, ...], by_channel: bool
) -> None:
    (rounding, relu), x, dim = mode, values(shape), 1 if len(shape) == 4 else -1
    limits, channels = Limits.of(torch.tensor(3.0), 0, 127, rounding, relu), x.shape[dim]
    multiplier = torch.rand(channels) + 0.5 if by_channel else torch.tensor(0.7)
    offset = torch.randn(channels) if by_channel else None
    spread = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
    u = x if offset is None else x + offset.reshape(spread)
    u = u * (multiplier.reshape(spread) if by_channel else multiplier)
    assert torch.equal(fused.fit(x, multiplier, offset, limits, dim), limits.fit(u))

    gradient = torch.randn(shape)
    passed, sums = fused.pull(gradient, x, multiplier, offset, limits, torch.tensor(2.0), dim)
    wanted = limits.inside(gradient, u)
    assert torch.allclose(passed, 2 * wanted)
    others = [d for d in range(x.dim()) if d != dim % x.dim()] if by_channel else list(range(x.dim()))
    total, moment = (part.sum(others) if others else part for part in (wanted, wanted * u))
    assert torch.allclose(sums[0], total, rtol=1e-4, atol=1e-3)
    assert torch.allclose(sums[1], moment, rtol=1e-4, atol=1e-2)
    assert torch.allclose(sums[2].sum(), limits.ends(gradient, u, wanted.sum()), rtol=1e-4, atol=1e-3)


def test_what_is_no_number_is_on_the_upper_end_and_says_nothing() -> None:
    x, gradient = torch.tensor([1.0, torch.nan, 300.0, 2.4]), torch.tensor([1.0, 1.0, 1.0, torch.nan])
    limits, one = Limits.of(torch.tensor(3.0), 0, 127, "round"), torch.tensor(1.0)
    assert fused.fit(x, one, None, limits).tolist() == [1, 124, 124, 2]
    passed, sums = fused.pull(gradient, x, one, None, limits)
    assert passed.tolist() == [1, 0, 0, 0] and sums.tolist() == [1, 1, -2]


def noted(used: set[str], name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    used.add(name)
    return function(*args, **kwargs)


def found(case: Case) -> Tensor:
    """The gradient of a batch."""
    images = case.batches[0][:2]
    twin, batch, groups = learnt(case, images)
    leaves = leaves_of(groups)
    with torch.no_grad():
        teacher = case.float_model(images)
        gradient = BatchGradient(twin, groups, Objective(kl, first_floating, True, feature_weight=3.0))
        _, total, _ = gradient.of(0, batch, teacher, leaves, 2.0)
    return total


@pytest.mark.parametrize("name", ["conv", "vit_w3"])
def test_a_gradient_is_that_of_plain_torch(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case: Case = request.getfixturevalue(name)
    plain, used = found(case), set[str]()

    def takes(value: Tensor, channel_dim: int | None = None) -> bool:
        last = channel_dim is None or channel_dim % value.dim() == value.dim() - 1
        return last or value.dim() == 4

    for kernel in ("fit", "pull", "add", "pull_add", "apart", "pull_apart"):
        monkeypatch.setattr(fused, kernel, partial(noted, used, kernel, getattr(fused, kernel)))
    monkeypatch.setattr(fused, "takes", takes)
    together = found(case)
    assert used >= {"fit", "pull"} and (name == "conv" or used >= {"add", "pull_add", "apart", "pull_apart"}), used
    assert float((together - plain).norm()) < 0.02 * float(plain.norm())
