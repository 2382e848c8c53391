"""Weights that are rounded up or down, not to the nearest code: what is written, what is kept, what it gains."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import Case, backend_of
from helpers.search import small_config
from torch import Tensor, nn

import cptv_ao
from cptv_ao.core.losses import kl
from cptv_ao.core.qparams import same
from cptv_ao.core.weight_rounding import round_weight
from cptv_ao.simulation.autograd_ops import RoundWeight
from cptv_ao.simulation.qtensor import Limits


def refined(case: Case, **changes: Any) -> Any:
    config = small_config(**{"gradient_steps": 60, "learning_rate": 0.03, "rounding_rate": 0.3, **changes})
    return cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)


def test_the_gradient_of_a_shift_is_that_of_the_weight_in_steps() -> None:
    weight, scale = torch.tensor([[0.3, -9.0, 0.9]]), torch.tensor([0.5], requires_grad=True)
    shift = torch.tensor([[0.2, 0.0, -0.4]], requires_grad=True)
    codes = RoundWeight.apply(weight, scale, 0, Limits(-4, 3, True), shift)
    assert codes.tolist() == [[1.0, -4.0, 1.0]]
    (codes * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert shift.grad is not None
    assert shift.grad.tolist() == [[1.0, 0.0, 100.0]], "none where a code is clipped"
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(-(0.3 + 100 * 0.9) / 0.25), "as without a shift"


def test_every_code_is_one_of_the_two_beside_its_float_weight(case: Case) -> None:
    model = refined(case, population=(), learning_rate=0.01)  # so that there is something left to the descent
    backend = backend_of(Case(case.float_model, case.prepared, model, case.batches))
    turned = total = 0
    for name, weight in backend.float_weights.items():
        site, qparams = backend.sites[name], backend.read(name)
        shape = [-1 if d == site.axis else 1 for d in range(weight.dim())]
        steps = weight / qparams.scale.float().reshape(shape) + qparams.zero_point.reshape(shape)
        codes = backend.weight(name).int_repr().clamp(site.qmin, site.qmax)  # sites that did not move may have +4
        low, high = (end.clamp(site.qmin, site.qmax) for end in (steps.floor(), steps.ceil()))
        on_code = (steps - steps.round()).abs() < 1e-3  # half a step up and down from a code are ties
        assert bool(((codes == low) | (codes == high) | on_code).all()), name
        turned += int((codes != round_weight(weight, replace(qparams, shift=None), site)).sum())
        total += weight.numel()
    moves = cptv_ao.report(model).moves
    assert 0 < turned == sum(move.turned for move in moves)
    assert total == sum(move.codes for move in moves)
    assert f"{turned} of {total} weight codes" in str(cptv_ao.report(model))


@pytest.mark.slow
def test_without_it_all_codes_are_the_nearest(vit_w3: Case) -> None:
    vit_w3.batches = vit_w3.batches[:2]
    model = refined(vit_w3, rounding_rate=0.0, gradient_steps=6, holdout=0, equalize=False)
    backend = backend_of(vit_w3)
    assert all(backend.read(name).shift is None for name in backend.sites)
    for name, weight in backend.float_weights.items():
        assert torch.equal(
            backend.weight(name).int_repr(), round_weight(weight, backend.read(name), backend.sites[name])
        )
    moves = cptv_ao.report(model).moves
    assert moves and all(move.turned == 0 for move in moves)


@pytest.mark.slow
def test_a_scale_that_moves_later_keeps_the_shift(vit_w2: Case) -> None:
    """A block visit moves scales of a model whose weights were rounded by the descent."""
    refined(vit_w2, passes=0)
    backend = backend_of(vit_w2)
    name = next(name for name in backend.float_weights if backend.read(name).shift is not None)
    before, state = backend.read(name), backend.state(name)
    codes = backend.weight(name).int_repr()
    backend.write(name, replace(before, scale=before.scale * 1.001))
    moved = (backend.weight(name).int_repr() != codes).double().mean()
    assert float(moved) < 0.02
    backend.restore(name, state)
    assert same(backend.read(name), before)
    assert torch.equal(backend.weight(name).int_repr(), codes)


@pytest.mark.slow
def test_a_second_refine_starts_from_what_the_first_one_left(vit_w2: Case) -> None:
    first = cptv_ao.report(refined(vit_w2)).after
    second = cptv_ao.report(refined(vit_w2, learning_rate=0.003, seed=1))
    assert second.before.search == pytest.approx(first.search, rel=1e-6)
    assert second.after.search <= first.search
    assert any(move.turned for move in second.moves) or not second.moves


@pytest.mark.slow
def test_it_is_worth_it_at_two_bits(vit_w2: Case, digits: Any) -> None:
    """On images that no search has seen: the mean of four draws, for a single one scatters by a quarter."""

    def loss(seed: int, rounding_rate: float) -> float:
        case, drawn = vit_w2.copy(), digits.calibration(1000, seed=5 + seed)
        case.batches, images = list(drawn[:300].split(50)), drawn[300:]
        model = refined(case, passes=0, rounding_rate=rounding_rate, seed=seed)
        with torch.inference_mode():
            return float(kl(model(images), case.float_model(images)))

    # Measured on six draws: .45, .41, .51, .65, 1.4, .56; of the means of any four of them at most .77.
    assert sum(loss(seed, 0.1) for seed in range(4)) < 0.9 * sum(loss(seed, 0.0) for seed in range(4))


@pytest.mark.slow
@pytest.mark.parametrize("folded", [True, False])
def test_a_graph_that_rounds_its_weights_itself_rounds_to_the_nearest(
    folded: bool, digits: Any, vit: nn.Module
) -> None:
    pytest.importorskip("torchao")
    from workloads import quantize_exported

    batches: list[Tensor] = list(digits.calibration(400, seed=0).split(100))
    model = quantize_exported(copy.deepcopy(vit), batches, weight_bits=3, activation_bits=4, fold_quantize=folded)
    case = Case(vit, model, model, batches)
    before = {name: value.clone() for name, value in model.state_dict().items() if value.dtype == torch.float32}
    found = cptv_ao.report(refined(case))
    assert found.status is not cptv_ao.Status.REJECTED
    assert bool(sum(move.turned for move in found.moves)) == folded
    if not folded:
        weights = [name for name in before if name.endswith("weight")]
        assert weights
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in weights)
