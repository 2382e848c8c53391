"""`plan`: it names what is worst first, with what must go together, and stock torch makes of it what the plan says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import nets, planned, pt2e
from helpers.cases import Case, reference_case
from helpers.quick import each_value, some
from helpers.state import everything
from torch import nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.loader import read_batches
from cptv_ao.diagnosis.float_search import Measure
from cptv_ao.diagnosis.plan_result import PlanStep
from cptv_ao.diagnosis.wiring import Wiring
from cptv_ao.evaluation.calibration import Images
from cptv_ao.simulation.simulated_backend import SimulatedBackend
from cptv_ao.transforms.float_model.exclusion import Part

MSE = cptv_ao.RefineConfig(loss="mse")
Quantize = Callable[[cptv_ao.Plan | None], GraphModule]


@pytest.fixture(autouse=True)
def _engine() -> None:
    torch.backends.quantized.engine = "x86"


def plan_of(model: nn.Module, made: Quantize, **arguments: Any) -> cptv_ao.Plan:
    settings: dict[str, Any] = {"config": MSE, "budget": 0.6, "progress": False} | arguments
    return cptv_ao.plan(made(None), planned.BATCHES, float_model=model, **settings)


def names(plan: cptv_ao.Plan, step: int = 0) -> set[str]:
    return {str(part) for part in plan.steps[step].parts}


def exported(quantizer: Any) -> Any:
    return lambda model: lambda plan: planned.quantize_pt2e(model, quantizer, planned.BATCHES, plan)


FLOWS: dict[str, Callable[[nn.Module], Quantize]] = {
    "fx": lambda model: partial(planned.quantize_fx, model), "x86": exported(pt2e.x86),
    "xnnpack": exported(pt2e.xnnpack),
}  # fmt: skip


@pytest.mark.parametrize("flow", some("fx", "x86", others=FLOWS))
def test_an_outlier_goes_with_all_that_rounds_it(flow: str) -> None:
    """It is rounded as long as the layer that makes it, or the one that reads it, observes it."""
    model = planned.outlier_between()
    quantize = FLOWS[flow](model)
    found = plan_of(model, quantize, quantize=quantize)
    assert "third" in names(found)
    whole = quantize(found.upto(1))
    assert found.steps[0].loss == pytest.approx(planned.mse(whole, model, planned.BATCHES), rel=1e-4)
    assert found.steps[0].loss < found.loss / 10
    for part in found.steps[0].parts:  # none of them can be left out
        rest = [other for other in found.steps[0].parts if other != part]
        if rest:
            fewer = quantize(_leaving(found, rest))
            assert planned.mse(fewer, model, planned.BATCHES) > 2 * found.steps[0].loss


def _leaving(plan: cptv_ao.Plan, parts: list[Part]) -> Any:
    return replace(plan, steps=(replace(plan.steps[0], parts=tuple(parts)),))


@pytest.mark.slow
def test_a_weight_with_few_bits_comes_before_all_other_layers(vit: nn.Module, vit_w3: Case) -> None:
    few = cptv_ao.qconfig_mapping(2, "x86").global_qconfig
    base = cptv_ao.qconfig_mapping(8, "x86").set_module_name("blocks.2.mlp.fc1", few)
    batches = vit_w3.batches[:2]
    _, converted = nets.quantize(vit, batches, mapping=base)
    found = cptv_ao.plan(converted, batches, float_model=vit, progress=False, budget=0.1)
    heavy = [names(found, i) for i, step in enumerate(found.steps) if step.share > 0.03]
    assert heavy[0] == {"blocks.2.mlp.fc1"}
    whole = found.upto(len(found.steps))
    _, partly = nets.quantize(vit, batches, mapping=whole.qconfig_mapping(base))
    assert isinstance(partly.get_submodule("blocks.2.mlp.fc1"), nn.Linear)
    with torch.no_grad():
        pairs = [(partly(batch), vit(batch)) for batch in batches]
    kl = torch.nn.functional.kl_div
    losses = [float(kl(a.log_softmax(1), b.log_softmax(1), log_target=True, reduction="batchmean")) for a, b in pairs]
    assert sum(losses) / len(losses) < 0.3 * found.loss


# The twin with a part in float, and what stock torch makes of it.


def study(model: nn.Module, quantize: Quantize, batches: list[torch.Tensor]) -> list[tuple[str, float, float]]:
    """Of each group of parts: its names, the loss of the twin and that of a model that was quantized so."""
    backend = Backend(quantize(None))
    attach_float_weights(backend, model)
    read = read_batches(batches, backend.form.intake(backend.model), 128)
    images = Images.of(read, model, MSE)
    measure = Measure(SimulatedBackend(backend).checked(read[0]).twin, Wiring(backend, model), images, MSE)
    empty = cptv_ao.Plan("mse", 0.0, 0.0, 0.0, 0, 1.0)
    found = []
    for group in sorted(measure.wiring.groups(), key=sorted):
        step = PlanStep(tuple(sorted(group)), 0.0, 0.0)
        made = quantize(replace(empty, steps=(step,)))
        kernels = planned.mse(made, model, batches)
        found.append((", ".join(map(str, step.parts)), measure(measure.wiring.parts.nodes_of(group)), kernels))
    return found


@pytest.mark.parametrize(("flow", "make"), each_value(FLOWS, [planned.outlier_between, planned.outlier_in_a_sum]))
def test_each_group_is_what_stock_torch_leaves_in_float(flow: str, make: Any) -> None:
    model = make()
    for group, twin, kernels in study(model, FLOWS[flow](model), planned.BATCHES):
        assert twin == pytest.approx(kernels, rel=0.05), group


def test_functions_that_are_left_in_float_are_those_of_one_module() -> None:
    model = planned.outlier_between()
    found = _leaving(plan_of(model, partial(planned.quantize_fx, model)), [Part("", functions=True)])
    kinds = [node.target for node in planned.quantize_fx(model, found).graph.nodes]
    assert torch.ops.quantized.add not in kinds
    assert torch.ops.quantized.add in [node.target for node in planned.quantize_fx(model).graph.nodes]


# The value.


def test_it_is_json_and_a_table(vit_w2: Case) -> None:
    found = cptv_ao.plan(vit_w2.converted, vit_w2.batches[:1], float_model=vit_w2.float_model, progress=False)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [step["parts"][0]["path"] for step in told["steps"]] == [step.parts[0].path for step in found.steps]
    shares = [step.share for step in found.steps]
    assert shares == sorted(shares) and shares[-1] <= found.budget == 0.1
    assert found.steps[-1].simulated < 0.8 * found.simulated
    assert str(found.steps[0].parts[0]) in str(found)
    assert "pass quantize=" in str(found)
    assert found.upto(1).parts == found.steps[0].parts
    assert found.loss == pytest.approx(found.simulated, rel=0.01)


@pytest.mark.parametrize("flow", some("fx", "xnnpack", others=FLOWS))
def test_the_same_twice_and_nothing_is_written(flow: str) -> None:
    model = planned.outlier_between()
    quantized, batches = FLOWS[flow](model)(None), [batch.clone() for batch in planned.BATCHES]
    before = everything(quantized), everything(model)
    run = partial(cptv_ao.plan, quantized, batches, float_model=model, progress=False, budget=0.6)
    found = run()
    assert found.steps
    assert (everything(quantized), everything(model)) == before
    assert all(map(torch.equal, batches, planned.BATCHES))
    assert asdict(found) == asdict(run())


def test_without_a_float_model_it_says_what_is_not_seen() -> None:
    model = planned.outlier_between()
    found = cptv_ao.plan(planned.quantize_fx(model), planned.BATCHES, config=MSE, budget=0.6, progress=False)
    assert "third" in names(found)  # the outlier is one of activations
    assert any("errors of its weights are not seen" in note for note in found.notes)


def test_a_reference_model_is_that_which_it_lowers_to() -> None:
    case = reference_case()
    found = cptv_ao.plan(case.converted, case.batches, float_model=case.float_model, budget=0.3, progress=False)
    model = nets.quantize(case.float_model, case.batches, mapping=nets.mapping(3))[1]
    lowered = cptv_ao.plan(model, case.batches, float_model=case.float_model, budget=0.3, progress=False)
    assert found.steps
    assert found.parts == lowered.parts


def test_a_model_without_a_twin_is_refused(functional: Case) -> None:
    model = nets.without_twin(functional.converted)
    with pytest.raises(cptv_ao.UnsupportedModelError, match="forward hooks change what the model returns"):
        cptv_ao.plan(model, functional.batches[:1], float_model=functional.float_model, progress=False)


def test_what_a_small_budget_does_not_pay_for_is_told() -> None:
    model = planned.outlier_between()
    found = plan_of(model, partial(planned.quantize_fx, model), budget=1e-6)
    assert found.steps == ()
    assert "nothing within 0.0 % of the int8 operations brings the loss down" in str(found)


def test_a_mapping_and_a_quantizer_are_not_written() -> None:
    model = planned.outlier_between()
    found = plan_of(model, partial(planned.quantize_fx, model))
    mapping = cptv_ao.qconfig_mapping(8, "x86")
    before = mapping.to_dict()
    assert found.qconfig_mapping(mapping).to_dict() != before
    assert mapping.to_dict() == before


def test_a_step_that_kernels_do_not_confirm_is_dropped() -> None:
    model = planned.outlier_between()
    found = plan_of(model, partial(planned.quantize_fx, model), quantize=lambda plan: planned.quantize_fx(model))
    assert found.steps == ()
    assert any("did not bring the loss of the kernels down" in note for note in found.notes)


def test_what_quantize_raises_is_told() -> None:
    model = planned.outlier_between()

    def fails(plan: cptv_ao.Plan) -> GraphModule:
        raise NotImplementedError("no kernel for this")

    found = plan_of(model, partial(planned.quantize_fx, model), quantize=fails)
    assert found.steps == ()
    assert any("no kernel for this" in note for note in found.notes)


def test_a_plan_composes_with_refine() -> None:
    model = planned.outlier_between()
    found = plan_of(model, partial(planned.quantize_fx, model)).upto(1)
    partly = planned.quantize_fx(model, found)
    before = planned.mse(partly, model, planned.BATCHES)
    config = cptv_ao.RefineConfig(loss="mse", gradient_steps=20, evaluations=10, passes=1)
    refined = cptv_ao.refine(partly, planned.BATCHES, float_model=model, config=config, progress=False)
    assert planned.mse(refined, model, planned.BATCHES) < before


# What a caller may get wrong.


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"budget": 0.0}, ValueError, "above 0 and up to 1, got 0.0"),
        ({"budget": 1.5}, ValueError, "got 1.5"),
        ({"budget": "5 %"}, TypeError, "expected a number, got str"),
        ({"config": {}}, TypeError, "expected a RefineConfig, got dict"),
        ({"quantize": 3}, TypeError, "expected a function of a plan, got int"),
        ({"quantize": lambda plan: None}, TypeError, "expected it to return a converted model, got NoneType"),
    ],
)
def test_errors_tell_what_was_expected(arguments: Any, error: type[Exception], told: str) -> None:
    model = planned.outlier_between()
    with pytest.raises(error, match=told):
        plan_of(model, partial(planned.quantize_fx, model), **arguments)


def test_errors_of_the_value() -> None:
    model = planned.outlier_between()
    found = plan_of(model, partial(planned.quantize_fx, model))
    with pytest.raises(TypeError, match="expected a QConfigMapping, got dict"):
        found.qconfig_mapping({})
    with pytest.raises(TypeError, match="expected a Quantizer of PT2E, got QConfigMapping"):
        found.quantizer(cptv_ao.qconfig_mapping())
    with pytest.raises(ValueError, match=f"expected 0 to {len(found.steps)}, got 99"):
        found.upto(99)
