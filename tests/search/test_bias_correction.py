"""Bias correction: the means of layers' outputs, what a refine makes of them, and where biases are kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import killed, nets
from helpers.cases import Case, backend_of
from helpers.search import small_config
from helpers.state import everything
from torch import Tensor, nn

import cptv_ao
from cptv_ao import RefineConfig
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import Assignment, QParams, same
from cptv_ao.evaluation.calibration import Calibration, Images
from cptv_ao.evaluation.cost import Cost
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.bias_correction import BiasCorrector, _usual, corrections
from cptv_ao.search.proposals.learnable_qparams import LearnableScales
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.simulation.twin import Twin, unquantized


def batches_of(images: list[Tensor]) -> list[Batch]:
    return [Batch((x,), {}, len(x)) for x in images]


def corrected_twin(case: Case, batches: list[Batch]) -> tuple[Twin, dict[str, Tensor]]:
    """At the observers' scales."""
    backend = backend_of(case)
    twin = Twin(backend)
    twin.reround_weights()
    found, _ = corrections(twin, backend.float_weights.keys(), batches)
    return twin, found


def refined(case: Case, **changes: Any) -> cptv_ao.Report:
    """With the biases alone, if nothing else is said."""
    config = small_config(**({"population": ("biases",), "passes": 0} | changes))
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    return cptv_ao.report(case.converted)


def test_a_layer_alone_gets_what_it_lost() -> None:
    """By hand: float mean less quantized mean, of each output channel; shares of batches count their images. What is
    beyond the range of the output is left alone: no bias brings it back."""
    float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 5)))
    images = nets.images(40, 6)
    prepared, model = nets.quantize(float_model, [images], weight_bits=2)
    case = Case(float_model, prepared, model, [images])
    backend = backend_of(case)
    backend.write("0.weight", backend.read("0.weight"))  # codes within -2..1
    layer = model.get_submodule("0")
    step, low = float(layer.scale), -float(layer.scale) * int(layer.zero_point)
    with torch.no_grad():
        lost = (float_model(images).clamp(low, low + 255 * step) - model(images)).mean(0)
    _, whole = corrected_twin(case, batches_of([images]))
    _, parts = corrected_twin(case, batches_of([images[:28], images[28:]]))
    assert float(lost.abs().max()) > step
    assert torch.allclose(whole["0.weight"], lost, atol=1e-6)
    assert torch.allclose(parts["0.weight"], lost, atol=step / 2)  # roundings of what was corrected already


def test_what_one_place_is_off_by_far_is_not_made_up_for_at_the_others() -> None:
    """Of errors that are not far apart it is the mean, also where a ReLU cuts most of both outputs off."""
    generator = torch.Generator().manual_seed(0)
    errors = 0.5 + 0.1 * torch.randn(200, 3, generator=generator)
    assert torch.allclose(_usual(errors), errors.mean(0), atol=1e-7)
    errors[:, 1] *= torch.rand(200, generator=generator) < 0.1
    assert torch.allclose(_usual(errors), errors.mean(0), atol=1e-7)
    errors[7, 2] += 1000.0
    assert float(errors[:, 2].mean()) > 5
    assert 0.4 < float(_usual(errors)[2]) < 0.8


def test_the_means_of_all_layers_are_those_in_float(vit_w2: Case) -> None:
    """Of each channel, over the images that were looked at, up to the roundings behind the correction."""
    batch = Batch((torch.cat(vit_w2.batches),), {}, 128)
    means: list[dict[str, Tensor]] = []
    for corrects in (False, True):
        backend = backend_of(vit_w2)
        twin = Twin(backend)
        twin.reround_weights()
        if corrects:
            corrections(twin, backend.float_weights.keys(), [batch])
        for seen in (unquantized(backend), twin):
            found: dict[str, Tensor] = {}

            def see(layer: Any, _: Any, output: Any, found: dict[str, Tensor] = found) -> None:
                found[layer.weight.site.name] = output.dequantize().flatten(0, -2).mean(0)

            hooks = [layer.register_forward_hook(see) for layer in seen.layers if "mlp" in layer.weight.site.name]
            seen(*batch.args)
            for hook in hooks:
                hook.remove()
            means.append(found)
    wanted, before, _, after = means
    for name, mean in wanted.items():
        assert float((after[name] - mean).norm()) < 0.2 * float((before[name] - mean).norm()), name


def test_the_kernels_confirm_it(vit_w2: Case) -> None:
    backend = backend_of(vit_w2)
    given = {name: backend.weights.biases.given(name) for name in backend.float_weights}
    _, found = corrected_twin(vit_w2, batches_of(vit_w2.batches))
    report = refined(vit_w2, holdout=0, equalize=False)
    assert report.stages[0].startswith("biases corrected: accepted")
    assert report.after.search < 0.9 * report.before.search
    assert sum(move.corrected for move in report.moves) == len(found) > 0
    assert f"the biases of {len(found)} layers are corrected" in str(report)
    for name, bias in given.items():
        now = backend_of(vit_w2).weights.slot(name).bias()
        assert bias is not None
        assert now is not None
        assert torch.allclose(now - bias, found[name], atol=0.05 * float(found[name].abs().max())), name


def test_float_mode_does_not_see_it(vit_w2: Case) -> None:
    """What the features of the descent are taken from."""
    images = vit_w2.batches[0]
    wanted = unquantized(backend_of(vit_w2))(images).dequantize()
    twin, found = corrected_twin(vit_w2, batches_of(vit_w2.batches))
    assert found
    with twin.in_float(twin.names):
        assert torch.equal(twin(images).dequantize(), wanted)


class Twice(nn.Module):
    """A layer without a bias, and one that runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(self.first(x)).relu())


@pytest.fixture
def twice() -> Case:
    float_model = nets.seeded(Twice)
    batches = list(nets.images(64, 6).split(16))
    prepared, model = nets.quantize(float_model, batches, weight_bits=2)
    return Case(float_model, prepared, model, batches)


def test_a_layer_without_a_bias_gets_one_and_one_that_runs_twice_none(twice: Case) -> None:
    _, found = corrected_twin(twice, batches_of(twice.batches))
    assert list(found) == ["first.weight"]
    backend = backend_of(twice)
    given, state = everything(twice.converted), backend.state("first.weight")
    assert backend.weights.biases.given("first.weight") is None
    held = replace(backend.read("first.weight"), correction=found["first.weight"])
    backend.write("first.weight", held)
    assert torch.equal(twice.converted.get_submodule("first").bias(), held.correction)
    assert same(backend.read("first.weight"), held)
    assert backend.weights.biases.given("first.weight") is None
    backend.write("first.weight", replace(held, correction=None))
    assert not bool(twice.converted.get_submodule("first").bias().any())
    backend.restore("first.weight", state)
    assert everything(twice.converted) == given


def test_a_scale_that_moves_later_keeps_it(vit_w2: Case) -> None:
    backend = backend_of(vit_w2)
    _, found = corrected_twin(vit_w2, batches_of(vit_w2.batches))
    name = "blocks.0.mlp.fc1.weight"
    given = backend.weights.biases.given(name)
    assert given is not None
    held = replace(backend.read(name), correction=found[name])
    backend.write(name, held)
    for factor in (1.1, 1.0):
        backend.write(name, replace(backend.read(name), scale=held.scale * factor))
        packed = vit_w2.converted.get_submodule("blocks.0.mlp.fc1").bias()
        assert torch.equal(packed, given + found[name])
    assert not same(held, QParams(held.scale, held.zero_point, held.shift))


def test_one_that_is_not_accepted_leaves_nothing(vit_w3: Case) -> None:
    before = everything(vit_w3.converted)["state_dict"]

    def stranger(candidate: Tensor, teacher: Tensor) -> Tensor:
        """Lowest where the model is: at what it gives now."""
        return (candidate - given[: len(candidate)]).square().mean() if len(candidate) == 32 else candidate.sum() * 0

    vit_w3.batches = vit_w3.batches[:1]
    given = vit_w3.converted(vit_w3.batches[0])
    report = refined(vit_w3, loss=stranger, holdout=0, equalize=False)
    assert report.stages[0].startswith("biases corrected: not better")
    assert not report.moves
    assert everything(vit_w3.converted)["state_dict"] == before


def test_a_second_refine_corrects_nothing_twice(vit_w2: Case) -> None:
    first = refined(vit_w2)
    second = refined(vit_w2)
    assert second.before.search == pytest.approx(first.after.search, rel=1e-6)
    assert second.after.search <= first.after.search


def test_files_hold_it(vit_w2: Case, twice: Case, tmp_path: Path) -> None:
    for case in (vit_w2, twice):
        fresh, other = case.copy().converted, case.copy().converted
        cptv_ao.save_scales(case.converted, tmp_path / "given")
        assert refined(case).moves
        cptv_ao.save_scales(case.converted, tmp_path / "refined")
        wanted, given = case.converted(case.batches[0]), fresh(case.batches[0])
        cptv_ao.load_scales(fresh, tmp_path / "refined")
        assert torch.equal(fresh(case.batches[0]), wanted)
        other.load_state_dict(case.converted.state_dict())
        assert torch.equal(other(case.batches[0]), wanted)
        cptv_ao.load_scales(fresh, tmp_path / "given")
        assert torch.equal(fresh(case.batches[0]), given)


def test_a_second_refine_knows_the_float_network(vit_w2: Case, twice: Case, tmp_path: Path) -> None:
    """What was added to biases is not taken for theirs: by the model, a copy of it, or scales from a file."""
    for case in (vit_w2, twice):
        given, fresh, images = backend_of(case), case.copy(), case.batches[0]
        biases = {name: given.weights.biases.given(name) for name in given.float_weights}
        wanted = unquantized(given)(images).dequantize()
        assert refined(case, equalize=False, holdout=0).moves
        cptv_ao.save_scales(case.converted, tmp_path / "scales")
        cptv_ao.load_scales(fresh.converted, tmp_path / "scales")
        added = dict[str, Tensor]()
        for other in (case, case.copy(), fresh):
            backend = backend_of(other)
            for name, bias in biases.items():
                now, correction = backend.weights.biases.given(name), backend.read(name).correction
                assert torch.equal(_whole(now), _whole(bias))
                if correction is not None:
                    assert torch.equal(added.setdefault(name, correction), correction)
            assert torch.equal(unquantized(backend)(images).dequantize(), wanted)
            assert torch.equal(Twin(backend)(images).dequantize(), Twin(backend_of(case))(images).dequantize())
        _, again = corrected_twin(case, batches_of(case.batches))
        assert added.keys() == again.keys()
        for name, correction in added.items():  # not twice of it, nor nothing
            assert float((again[name] - correction).norm()) < 0.1 * float(correction.norm()), name


def _whole(bias: Tensor | None) -> Tensor:
    return torch.zeros(0) if bias is None else bias


def test_what_is_said_of_other_biases_is_not_believed(vit_w2: Case) -> None:
    """Whoever put other ones there, or wrote into the `meta`."""
    fresh = vit_w2.copy().converted
    assert refined(vit_w2).moves
    model, name = vit_w2.converted, "blocks.0.mlp.fc1.weight"
    known = {key: found for key, found in model.meta.items() if isinstance(found, dict) and name in found}
    (key,) = known
    assert Backend(model).read(name).correction is not None
    for wrong in (None, {name: None}, {name: (1, 2)}, {name: (torch.ones(3), torch.ones(2))}, {"x": known[key][name]}):
        model.meta[key] = wrong
        assert Backend(model).read(name).correction is None
    model.meta |= known
    model.load_state_dict(fresh.state_dict())
    backend = Backend(model)
    assert backend.read(name).correction is None
    assert torch.equal(_whole(backend.weights.biases.given(name)), _whole(Backend(fresh).weights.biases.given(name)))


@pytest.mark.slow
@pytest.mark.parametrize("score_on", ["kernels", "simulation"])
def test_a_killed_search_goes_on_with_it(vit_w2: Case, score_on: str, tmp_path: Path) -> None:
    """In the descent, whose proposals are corrected anew, and in the visits."""
    changes: dict[str, Any] = {"population": ("biases",), "gradient_steps": 8, "passes": 1, "score_on": score_on}
    whole, path = vit_w2.copy(), tmp_path / "search"
    events = killed.refine(whole, None, **changes)
    assert any(move.corrected for move in cptv_ao.report(whole.converted).moves)
    for kill_at in (4, len(events) // 2):
        with pytest.raises(killed.Killed):
            killed.refine(vit_w2.copy(), path, kill_at=kill_at, **changes)
    killed.refine(vit_w2, path, **changes)
    images = vit_w2.batches[0]
    assert torch.equal(vit_w2.converted(images), whole.converted(images))


def proposer_of(case: Case, backend: Backend, cost: Cost | None = None, **changes: Any) -> Proposer:
    """Proposes for a model, whose search images are all of the case's."""
    search = Images.of([Batch((x,), {}, len(x)) for x in case.batches], case.float_model, RefineConfig())
    calibration = Calibration(small_config(**changes), search, cost=cost or Cost())
    return Proposer(backend, backend, backend.movable(), calibration, Budget())


@torch.no_grad()
def test_a_descent_that_is_sent_back_is_where_it_was(vit_w2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels saturate on in a proposal is limited in it, and free again once it is not accepted."""
    backend = backend_of(vit_w2)
    proposer = proposer_of(vit_w2, backend, gradient_steps=12)
    twin, losses = proposer._searched.twin, list[float]()
    wide = next(name for name in backend.movable() if backend.sites[name].affine)
    found = "cptv_ao.search.proposals.saturation_limits.saturating_inputs"
    monkeypatch.setattr(found, lambda *_: {wide: 254} if losses else {})
    names = []
    for name, scales in proposer.proposals(losses.append, lambda worth: None):  # and none of it is written
        names.append(name)
        assert twin.sites.modules[wide].site.qmax == 127
        wider = scales()[wide].scale / backend.read(wide).scale
        assert wider > (1.5**0.25 if name.endswith("25 % of the way") else 1.5**0.5 if "of the way" in name else 1.5)
    assert len([name for name in names if "of the way" not in name]) == 2, "it ends at the second time"
    assert twin.sites.modules[wide].site.qmax == backend.sites[wide].qmax == 255
    assert max(losses[3:]) < 2 * max(losses[:3])


@torch.no_grad()
def test_what_was_refused_is_tried_once_more_with_its_biases(vit_w2: Case) -> None:
    """Weights and ranges whose means nobody had corrected: behind accepted biases each has those that fit it."""
    backend = backend_of(vit_w2)
    proposer = proposer_of(vit_w2, backend, population=("output_error", "curvature", "biases"), gradient_steps=0)
    weights, ranges = "weight scales of least output error", "activation ranges of least loss"
    tried = dict[str, Assignment]()
    for name, scales in proposer.proposals(lambda loss: None, lambda worth: None):
        tried[name] = scales()
        if name == "biases corrected":
            for site, qparams in tried[name].items():
                backend.write(site, qparams)
    behind = [f"{name}, biases corrected" for name in (weights, ranges)]
    assert list(tried)[-3:] == ["biases corrected", *behind]
    for name in tried[weights]:
        again = tried[behind[0]][name]
        assert torch.equal(again.scale, tried[weights][name].scale)
        assert again.correction is not None and not same(again, tried["biases corrected"][name])


@torch.no_grad()
def test_what_a_descent_proposes_has_biases_of_its_own_however_dear_they_are(vit_w2: Case) -> None:
    backend = backend_of(vit_w2)
    cost = Cost(1e6, seconds=0.01, kernel_seconds=0.01, limit=24.0)  # pays for the means of 16 images
    proposer = proposer_of(vit_w2, backend, cost, population=("biases",), gradient_steps=8)
    assert proposer._biases.dear and proposer._biases.worth(backend)
    accepted, tried = Assignment(), dict[str, Assignment]()
    for name, scales in proposer.proposals(lambda loss: None, lambda worth: None):
        tried[name] = scales()
        if name == "biases corrected":
            accepted = tried.pop(name)
            for site, qparams in accepted.items():
                backend.write(site, qparams)
    assert tried and all(name.startswith("gradient") for name in tried)
    for assignment in tried.values():
        for site, qparams in accepted.items():
            own, before = assignment[site].correction, qparams.correction
            assert own is not None and before is not None and not torch.equal(own, before), site


def test_a_descent_learns_them_unless_biases_are_left_alone(vit_w2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scales, also where those that fit the given scales are refused."""
    monkeypatch.setattr(BiasCorrector, "corrected", lambda *_: {})
    for population, learnt in (("biases",), True), ((), False):
        report = refined(copy.deepcopy(vit_w2), population=population, gradient_steps=8, holdout=0)
        assert any(move.corrected for move in report.moves) is learnt
        assert report.after.search < report.before.search


def test_what_is_learnt_of_a_bias_is_counted_in_steps_of_its_channel(vit_w2: Case) -> None:
    backend = backend_of(vit_w2)
    twin, (name, *_) = Twin(backend), list(backend.float_weights)
    unit = torch.linspace(0.1, 2.0, backend.sites[name].shape[0])
    scales = LearnableScales(twin, {name: (backend.sites[name],)}, True, {name: unit})
    (group,) = scales.groups
    assert group.bias is not None and not bool(group.bias.leaf.any())
    with torch.no_grad():
        group.bias.leaf.fill_(3.0)
    proposed = scales.assignment()[name].correction
    assert proposed is not None and torch.allclose(proposed, 3 * unit)
    assert torch.equal(group.values()["correction"], group.bias.leaf * unit)
    scales.go_to(backend.read, 0.5)
    assert torch.allclose(group.bias.leaf, torch.full_like(unit, 1.5))
    scales.take_biases(lambda _: replace(backend.read(name), correction=-unit))
    assert torch.allclose(group.bias.leaf, torch.full_like(unit, -1.0))
    assert not LearnableScales(twin, {name: (backend.sites[name],)}, True).units
