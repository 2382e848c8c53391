"""Equivalent forms of a converted model: equal in float, better to search, taken back where nothing comes of them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case, backend_of, error, in_float
from helpers.quick import some
from helpers.search import small_config
from helpers.state import everything, in_double, weights
from helpers.uneven import TracedNorm, uneven
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE
from cptv_ao.core.losses import kl
from cptv_ao.search import baseline
from cptv_ao.transforms.equalize import equalize
from cptv_ao.transforms.lowered_patterns import Patterns
from cptv_ao.transforms.range_clipping import observed_codes


@pytest.fixture(scope="module")
def _unfused() -> Case:
    model = uneven()
    batches = list(nets.images(24, 3, 8, 8).split(6))
    prepared, converted = nets.quantize(model, batches)
    return Case(model, prepared, converted, batches)


@pytest.fixture
def unfused(_unfused: Case) -> Case:
    return _unfused.copy()


def first_values(model: GraphModule, nodes: tuple[str, ...], image: Tensor) -> dict[str, Tensor]:
    """What these nodes give."""
    found: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n.name in nodes:
                found[n.name] = value
            return value

    Watch(model).run(image)
    return found


CONFIG = small_config(evaluations=4, gradient_steps=8, population=("ranges",), loss="mse")


def refine(case: Case, **changes: Any) -> GraphModule:
    settings: dict[str, Any] = {"config": CONFIG, "progress": False} | changes
    return cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, **settings)


@torch.no_grad()
def test_the_function_in_float_stays_and_the_float_model_too(unfused: Case) -> None:
    backend = backend_of(unfused)
    float_state = copy.deepcopy(unfused.float_model.state_dict())
    before = in_float(backend, unfused.batches[0])
    assert [norm.weight for norm in Patterns(backend).unfused_norms()] == ["conv1.weight", "conv2.weight"]
    assert [[reader.weight for reader in norm.readers] for norm in Patterns(backend).read_norms()] == [["fc.weight"]]
    assert equalize(backend, [Batch((unfused.batches[0],), {}, 6)]) == [
        "2 batch norms folded into the scales and biases of the layers before them",
        "ranges of 2 activations cut to what the functions behind them let through",
        "7 channels of 1 layer brought to like ranges with the layers behind them",
        "5 channels of 1 input of linear layers evened out with the weights there",
        "the channels of 1 input of linear layers moved to the middle of their ranges",
    ]
    torch.testing.assert_close(in_float(backend, unfused.batches[0]), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_float(backend_of(unfused), unfused.batches[0]), before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, float_state[name]) for name, value in unfused.float_model.state_dict().items())
    assert equalize(backend_of(unfused), [Batch((unfused.batches[0],), {}, 6)]) == [], "it is equalized already"


@torch.no_grad()
def test_a_folded_norm_rounds_nothing_anew(unfused: Case) -> None:
    """What the convolution gives is on the very scale behind the norm, and the norm is the identity."""
    backend = backend_of(unfused)
    first = Patterns(backend).unfused_norms()[0]
    equalize(backend, [Batch((unfused.batches[0],), {}, 6)])
    conv, after = backend.read(first.output), backend.read(first.after)
    assert (conv.scale, conv.zero_point) == (after.scale, after.zero_point)
    assert backend.sites[first.after].tied == first.output
    assert conv.zero_point == 0, "nothing below 0 passes the ReLU6"
    values = first_values(unfused.converted, ("conv1", "quantize_per_tensor_2"), unfused.batches[0])
    assert torch.equal(values["conv1"].int_repr(), values["quantize_per_tensor_2"].int_repr())


def test_equal_codes_where_no_weight_changes_its_sign() -> None:
    """Scales take the factors: not one code of a positive channel is another."""
    model = uneven()
    with torch.no_grad():
        model.get_submodule("bn1").weight.abs_()
    batches = list(nets.images(8, 3, 8, 8).split(4))
    case = Case(model, *nets.quantize(model, batches), batches)
    with torch.no_grad():
        backend = backend_of(case)
        before = backend.weight("conv1.weight").int_repr()
        equalize(backend, [Batch((batches[0],), {}, 4)])
    still = [channel for channel in range(8) if channel not in (3, 4)]  # these hardly vary
    after = backend.weight("conv1.weight").int_repr()
    assert torch.equal(after[still], before[still]) and not after[3:5].any()


def test_block_visits_run_the_norms_that_are_there(unfused: Case) -> None:
    refine(unfused, config=replace(CONFIG, evaluations=12))
    report = cptv_ao.report(unfused.converted)
    assert sum(result.accepted for result in report.blocks) >= 2
    search = Case(unfused.float_model, unfused.prepared, unfused.converted, unfused.batches[:3])
    assert report.after.search == pytest.approx(error(unfused.converted, search), rel=1e-4)


@pytest.mark.parametrize("changes", [{"kinds": ("activation",)}, {"kinds": ("weight",)}, {"include": ("*.weight",)}])
def test_a_search_of_a_part_leaves_the_rest(unfused: Case, changes: Any) -> None:
    refine(unfused, config=replace(CONFIG, **changes))
    assert not [note for note in cptv_ao.report(unfused.converted).notes if "folded" in note]


@pytest.mark.parametrize("reduced", [True, False])
@torch.no_grad()
def test_ranges_are_cut_to_as_many_codes_as_the_observers_use(reduced: bool) -> None:
    model, batches = uneven(), list(nets.images(8, 3, 8, 8).split(4))
    observed = nets.qconfig()
    activation = MinMaxObserver.with_args(reduce_range=reduced)
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=observed.weight))
    case = Case(model, *nets.quantize(model, batches, mapping=mapping), batches)
    backend = backend_of(case)
    site = Patterns(backend).unfused_norms()[0].after
    before = backend.read(site)
    equalize(backend, [Batch((batches[0],), {}, 4)])
    found, codes = backend.read(site), 127 if reduced else 255
    top = min(6.0, float(before.scale) * (codes - int(before.zero_point)))
    assert int(before.zero_point) > 0 and int(found.zero_point) == 0
    assert float(found.scale) == pytest.approx(top / codes, rel=1e-6)


@torch.no_grad()
def test_values_at_the_end_of_a_range_are_not_taken_for_eight_bits() -> None:
    """They are rounded to the code behind the last one of the observers."""
    model, batches = nets.seeded(nets.ConvNet), list(nets.images(8, 3, 16, 16).clamp(-0.5, 0.5).split(4))
    backend = backend_of(Case(model, *nets.quantize(model, batches), batches))
    nodes = tuple(node.name for node in backend.model.graph.nodes if node.target is torch.quantize_per_tensor)
    given = next(iter(first_values(backend.model, nodes, batches[0]).values())).int_repr()
    assert int(given.max()) == 128 and float((given > 127).float().mean()) > 0.2
    assert observed_codes(backend, Batch((batches[0],), {}, 4), ALONE) == 127


def test_it_helps(unfused: Case) -> None:
    other = unfused.copy()
    start = error(unfused.converted, unfused)
    refine(unfused, config=replace(CONFIG, gradient_steps=40))
    refine(other, config=replace(CONFIG, gradient_steps=40, equalize=False))
    assert error(unfused.converted, unfused) < 0.8 * error(other.converted, other) < 0.5 * start
    notes = " ".join(cptv_ao.report(unfused.converted).notes)
    assert "2 batch norms folded" in notes and "channels of 1 input of linear layers evened out" in notes
    assert "folded" not in " ".join(cptv_ao.report(other.converted).notes)


def test_never_worse_is_against_the_model_that_was_given(unfused: Case) -> None:
    """A loss by which only that one is right: it comes back bit for bit, and no note claims anything."""
    own = {b.numpy().tobytes(): unfused.converted(b) for b in unfused.batches}
    targets = {unfused.float_model(b).detach().numpy().tobytes(): own[b.numpy().tobytes()] for b in unfused.batches}

    def loss(outputs: Tensor, teacher: Tensor) -> Tensor:
        return (outputs - targets[teacher.detach().numpy().tobytes()]).square().mean()

    as_given = weights(unfused.converted)
    refine(unfused, config=small_config(loss=loss))
    assert weights(unfused.converted) == as_given
    report = cptv_ao.report(unfused.converted)
    assert report.status is cptv_ao.Status.UNCHANGED and report.before == report.after
    assert not [note for note in report.notes if "folded" in note]


def test_the_model_is_as_it_was_after_an_error(unfused: Case) -> None:
    def fail(event: cptv_ao.Event) -> None:
        if event.kind == "candidate":
            raise RuntimeError("no more")

    given = everything(unfused.converted)
    with pytest.raises(RuntimeError, match="no more"):
        refine(unfused, callback=fail)
    assert everything(unfused.converted) == given


def test_what_was_refined_is_refined_again_and_diagnosed(unfused: Case) -> None:
    refine(unfused)
    first = error(unfused.converted, unfused)
    cptv_ao.diagnose(unfused.converted, unfused.batches, float_model=unfused.float_model)
    refine(unfused)
    assert error(unfused.converted, unfused) <= first * (1 + 1e-6)
    assert not [note for note in cptv_ao.report(unfused.converted).notes if "folded" in note]


def test_a_fresh_conversion_gets_it_all(unfused: Case, tmp_path: Path) -> None:
    fresh, stated, given = unfused.copy().converted, unfused.copy().converted, unfused.converted(unfused.batches[0])
    cptv_ao.save_scales(unfused.converted, tmp_path / "given")
    wanted = refine(unfused)(unfused.batches[0])
    cptv_ao.save_scales(unfused.converted, tmp_path / "refined")
    cptv_ao.load_scales(fresh, tmp_path / "refined")
    assert torch.equal(fresh(unfused.batches[0]), wanted)
    stated.load_state_dict(unfused.converted.state_dict())
    assert torch.equal(stated(unfused.batches[0]), wanted)
    cptv_ao.load_scales(unfused.converted, tmp_path / "given")
    assert torch.equal(unfused.converted(unfused.batches[0]), given)


@pytest.mark.parametrize("kill_at", some(2, 11, others=[9, 14]))
def test_a_killed_search_goes_on_to_the_same_end(unfused: Case, tmp_path: Path, kill_at: int) -> None:
    whole, killed = unfused.copy(), unfused.copy()
    wanted = refine(whole)(unfused.batches[0])
    left = [kill_at]

    def kill(_: cptv_ao.Event) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        refine(killed, callback=kill, checkpoint=tmp_path / "search")
    refine(killed, checkpoint=tmp_path / "search")
    assert torch.equal(killed.converted(unfused.batches[0]), wanted)
    assert cptv_ao.report(killed.converted).after == cptv_ao.report(whole.converted).after


def test_a_search_on_the_simulation_starts_from_it_too(unfused: Case) -> None:
    start = error(unfused.converted, unfused)
    refine(unfused, config=small_config(gradient_steps=8, loss="mse", score_on="simulation"))
    report = cptv_ao.report(unfused.converted)
    assert error(unfused.converted, unfused) < 0.5 * start
    assert [note for note in report.notes if "folded" in note]
    assert report.before.search == pytest.approx(start, rel=0.5)


def test_what_ships_is_what_it_is_judged_by(unfused: Case) -> None:
    """A search on the simulation, accepted on what a function makes of the model: the model that was given, too."""
    made: list[GraphModule] = []

    def ship(model: GraphModule) -> GraphModule:
        made.append(model)
        return model

    start = error(
        unfused.converted, Case(unfused.float_model, unfused.prepared, unfused.converted, unfused.batches[:3])
    )
    refine(unfused, config=small_config(gradient_steps=8, loss="mse", score_on="simulation", accept_on=ship))
    report = cptv_ao.report(unfused.converted)
    assert report.before.search == pytest.approx(start, rel=1e-5)
    assert report.after.search < 0.5 * start and len(made) == 3  # as given, in its other form, and at the end


def test_a_form_that_computes_no_numbers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3), TracedNorm(5)))
    batches = list(nets.images(16, 3, 3, 3).split(4))
    case = Case(model, *nets.quantize(model, batches), batches)

    def spoil(backend: Any, *_: Any) -> list[str]:
        backend.rewrites.put("2.weight", "3.bias", torch.full((5,), torch.nan))
        return ["spoilt"]

    monkeypatch.setattr(baseline, "equalize", spoil)
    start = error(case.converted, case)
    refine(case)
    assert error(case.converted, case) < start
    assert "spoilt" not in cptv_ao.report(case.converted).notes


def test_without_a_float_model_norms_are_folded_and_no_channel_is_multiplied(unfused: Case) -> None:
    with pytest.warns(cptv_ao.CptvWarning, match="without float_model"):
        cptv_ao.refine(unfused.converted, unfused.batches, config=CONFIG, progress=False)
    notes = " ".join(cptv_ao.report(unfused.converted).notes)
    assert "2 batch norms folded" in notes and "evened out" not in notes


@pytest.mark.slow
def test_an_outlier_vit_loses_next_to_nothing(vit: nn.Module, digits: Any) -> None:
    from workloads import logits, quantize, with_outliers

    images = digits.calibration(400, seed=0)
    model = with_outliers(vit)
    _, converted = quantize(copy.deepcopy(model), images[:200].split(50))

    def loss(network: nn.Module) -> float:
        return float(kl(logits(network, images[200:]), logits(vit, images[200:])))

    start = loss(converted)
    batches = images[:200].split(50)
    told = cptv_ao.diagnose(converted, batches[:1], float_model=model)
    norms = {name.rpartition(".")[0] for name in told.findings.smoothable}
    assert norms == {f"blocks.{block}.norm{norm}" for block in range(4) for norm in (1, 2)}
    config = cptv_ao.RefineConfig(population=(), gradient_steps=0, passes=0)
    cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
    assert loss(converted) < 0.05 * start
    note = next(note for note in cptv_ao.report(converted).notes if "evened out" in note)
    assert int(note.split()[0]) >= 24 and "of 8 inputs of linear layers" in note


def test_a_form_of_a_corrected_model_keeps_what_was_added(unfused: Case) -> None:
    """It rewrites the biases as they are, whoever made them so."""
    config = replace(CONFIG, population=("biases",), equalize=False, gradient_steps=0, passes=0)
    cptv_ao.refine(unfused.converted, unfused.batches, float_model=unfused.float_model, config=config, progress=False)
    backend, image = backend_of(unfused), unfused.batches[0]
    corrected = [name for name in backend.float_weights if backend.read(name).correction is not None]
    assert corrected
    state, before, uncorrected = backend.snapshot(), unfused.converted(image), in_float(backend, image)
    known = backend.weights.biases.take_as_given()
    wanted = in_float(backend, image)
    backend.weights.biases.know(known)
    assert equalize(backend, [Batch((x,), {}, len(x)) for x in unfused.batches])
    assert float((in_float(backend, image) - wanted).norm()) < 0.1 * float((wanted - uncorrected).norm())
    assert all(backend.read(name).correction is None for name in corrected)
    backend.restore_all(state)
    assert torch.equal(unfused.converted(image), before)
    assert all(backend.read(name).correction is not None for name in corrected)


def test_another_default_dtype_changes_nothing(unfused: Case) -> None:
    """Of the user's process; what is made here has a dtype of its own."""
    other = unfused.copy()
    config = replace(CONFIG, population=("ranges", "curvature", "biases"))
    outputs = []
    for case, around in ((unfused, nullcontext()), (other, in_double())):
        with around:
            cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
        outputs.append(case.converted(case.batches[0]))
    assert cptv_ao.report(unfused.converted).moves
    assert torch.equal(*outputs)
