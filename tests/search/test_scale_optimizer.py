"""Adam on leaves of several rates: against plain Adam, and the same after it was put away and taken out again."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_store import activation, weight
from torch import Tensor

from cptv_ao.search.proposals.learnable_qparams import LearnableQParams
from cptv_ao.search.proposals.scale_optimizer import ScaleOptimizer


def groups() -> list[LearnableQParams]:
    """An activation (two leaves) and a weight with shifts (two more)."""
    one = LearnableQParams((activation("a"),), torch.zeros(()).requires_grad_(), torch.ones(()).requires_grad_(), None)
    steps = torch.zeros(3, 2).requires_grad_()
    return [one, LearnableQParams((weight("w", 3),), torch.zeros(3).requires_grad_(), None, steps)]


def gradients(count: int = 5) -> list[Tensor]:
    return list(torch.randn(count, 11, generator=torch.Generator().manual_seed(0)))


def moved(optimizer: ScaleOptimizer) -> Tensor:
    return torch.cat([leaf.detach().reshape(-1) for leaf in optimizer.leaves])


def test_each_kind_moves_at_its_rate() -> None:
    made = groups()
    optimizer = ScaleOptimizer(made, activation_rate=2.0, rounding_rate=0.5)
    start = moved(optimizer).clone()
    optimizer.step(torch.ones(11), 0.01)
    assert [len(leaf.reshape(-1)) for leaf in optimizer.leaves] == [1, 1, 3, 6]
    wanted = torch.tensor([0.02] * 2 + [0.01] * 3 + [0.005] * 6)  # a first step of Adam is its rate
    assert torch.allclose(start - moved(optimizer), wanted, rtol=1e-4)


def test_it_is_adam() -> None:
    optimizer, plain = ScaleOptimizer(groups(), 1.0, 1.0), torch.zeros(11)
    plain[1] = 1.0
    plain.requires_grad_()
    adam = torch.optim.Adam([plain], lr=0.003, betas=(0.9, 0.95))
    for gradient in gradients():
        optimizer.step(gradient.clone(), 0.003)
        plain.grad = gradient
        adam.step()
    # leaves of one rate are one group: those of the activation, the weight's scales, its shifts
    assert torch.allclose(moved(optimizer), plain.detach(), atol=1e-6)


def test_what_is_no_number_moves_nothing_and_shifts_stay_within_half_a_step() -> None:
    made = groups()
    optimizer = ScaleOptimizer(made, 1.0, 1.0)
    gradient = torch.full((11,), -1.0)
    gradient[0], gradient[3] = float("nan"), float("inf")
    for _ in range(3):
        optimizer.step(gradient.clone(), 0.4)
    assert float(made[0].log_scale.detach()) == 0 and float(made[1].log_scale.detach()[1]) == 0
    assert float(made[1].log_scale.detach()[0]) > 1
    assert made[1].shift is not None and torch.equal(made[1].shift.detach(), torch.full((3, 2), 0.5))


def test_it_goes_on_where_it_was() -> None:
    whole, first, second = (ScaleOptimizer(groups(), 2.0, 0.5) for _ in range(3))
    for gradient in gradients():
        whole.step(gradient.clone(), 0.01)
    for gradient in gradients()[:3]:
        first.step(gradient.clone(), 0.01)
    second.set_state({name: tensor.clone() for name, tensor in first.state().items()})
    for gradient in gradients()[3:]:
        second.step(gradient.clone(), 0.01)
    assert torch.equal(moved(second), moved(whole))


@pytest.mark.parametrize("change", ["shape", "dtype", "nan"])
def test_another_state_is_refused(change: str) -> None:
    optimizer = ScaleOptimizer(groups(), 1.0, 1.0)
    optimizer.step(torch.ones(11), 0.01)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    leaf = state["leaf/2"]
    state["leaf/2"] = {"shape": leaf[:2], "dtype": leaf.double(), "nan": leaf * float("nan")}[change]
    with pytest.raises(ValueError, match="expected finite numbers of shape"):
        optimizer.set_state(state)


def test_a_direction_is_forgotten_and_sizes_are_not() -> None:
    kept, forgot, fresh = (ScaleOptimizer(groups(), 1.0, 1.0) for _ in range(3))
    for optimizer in (kept, forgot):
        optimizer.step(torch.full((11,), 4.0), 0.01)
    forgot.forget_direction()
    before = moved(forgot).clone(), moved(fresh).clone()
    forgot.step(torch.zeros(11), 0.01)
    kept.step(torch.zeros(11), 0.01)
    assert torch.equal(moved(forgot), before[0]), "nothing pulls it on"
    assert not torch.equal(moved(kept), before[0])
    forgot.step(torch.full((11,), 0.01), 0.01)
    fresh.step(torch.full((11,), 0.01), 0.01)
    assert bool(((before[0] - moved(forgot)) < 0.1 * (before[1] - moved(fresh))).all()), "a small gradient is small"
