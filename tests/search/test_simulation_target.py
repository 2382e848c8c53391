"""Search on the float twin, accept or reject on the kernels; and what a report says of their disagreement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.search import loss_of, small_config
from helpers.state import everything, weights

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.fx.segments import Segments, storages
from cptv_ao.search.proposals.searched_scales import SearchedScales
from cptv_ao.simulation import kernel_agreement
from cptv_ao.simulation.qtensor import QTensor
from cptv_ao.simulation.simulated_backend import SimulatedBackend
from cptv_ao.simulation.twin import Twin

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _simulated(device: str, **changes: Any) -> cptv_ao.RefineConfig:
    return small_config(score_on="simulation", device=device, **changes)


def _refined(case: Case, config: cptv_ao.RefineConfig, **arguments: Any) -> cptv_ao.Report:
    refined = cptv_ao.refine(
        case.converted, case.batches, float_model=case.float_model, config=config, progress=False, **arguments
    )
    return cptv_ao.report(refined)


def test_never_worse_on_the_kernels(case: Case, device: str) -> None:
    search, holdout = case.batches[:3], case.batches[3:]
    before = [loss_of(case.converted, case.float_model, part) for part in (search, holdout)]
    report = _refined(case, _simulated(device, evaluations=6))
    after = [loss_of(case.converted, case.float_model, part) for part in (search, holdout)]
    assert [report.before.search, report.before.holdout] == pytest.approx(before, rel=1e-5)
    assert [report.after.search, report.after.holdout] == pytest.approx(after, rel=1e-5)
    assert after[0] < before[0]
    assert after[1] <= before[1]
    assert report.status is cptv_ao.Status.IMPROVED
    assert report.moves
    assert any("the kernels confirm it" in note for note in report.notes)


@pytest.mark.parametrize("proposals", ["population", "gradient"])
def test_proposals_are_tried_on_the_twin(case: Case, device: str, proposals: str) -> None:
    before = loss_of(case.converted, case.float_model, case.batches)
    population = ("output_error", "ranges", "biases") if proposals == "population" else ()
    steps = 60 if proposals == "gradient" else 0
    proposed: dict[str, Any] = {"population": population, "gradient_steps": steps, "learning_rate": 0.005}
    config = _simulated(device, holdout=0, passes=0, **proposed)
    report = _refined(case, config)
    expected = "gradient" if steps else "weight scales of least output error"
    accepted = [stage for stage in report.stages if stage.startswith(expected) and ": accepted" in stage]
    assert accepted, "else the rest tests nothing"
    after = loss_of(case.converted, case.float_model, case.batches)
    assert after < before
    assert report.after.search == pytest.approx(after, rel=1e-5)


def test_the_descent_starts_from_what_the_population_left_in_the_twin(
    vit_w3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the lowered model, which is written at the end only."""
    seen = []
    follow = SearchedScales.follow

    def followed(self: SearchedScales) -> None:
        follow(self)
        now = (self.twin.sites.get, self.store.read, self.kernels.read)
        seen.append([read("head.weight").scale for read in now])

    monkeypatch.setattr(SearchedScales, "follow", followed)
    population, vit_w3.batches = ("output_error",), vit_w3.batches[:1]
    report = _refined(vit_w3, _simulated("cpu", holdout=0, passes=0, population=population, gradient_steps=2))
    assert report.stages[0].startswith("weight scales of least output error: accepted")
    assert seen and all(torch.equal(twin, searched) for twin, searched, _ in seen)
    assert not any(torch.equal(twin, lowered) for twin, _, lowered in seen)


def test_what_the_search_reads_is_the_simulation(conv: Case, device: str) -> None:
    """The kernels run on the input model and on the result, not once per candidate."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    handle = conv.converted.register_forward_pre_hook(count)
    handle_inner = conv.converted.conv1.register_forward_pre_hook(count)
    _refined(conv, _simulated(device, evaluations=2))
    few, forwards = forwards, 0
    _refined(conv, _simulated(device, evaluations=20))
    handle.remove()
    handle_inner.remove()
    assert 0 < forwards <= few


def test_worse_on_the_kernels_is_rejected(conv: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that disagree with the simulation: here a simulation that is asked to lower another loss."""
    given = weights(conv.converted)
    on_kernels = 0

    def treacherous(candidate: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        nonlocal on_kernels
        scored_by_kernels = on_kernels < 4 or confirming
        on_kernels += 1
        return torch.tensor(1.0 + on_kernels if scored_by_kernels else 2.0 - on_kernels / 1000)

    confirming = False
    commit = SimulatedBackend.commit

    def committed(self: SimulatedBackend) -> list[str]:
        nonlocal confirming
        confirming = True
        names = commit(self)
        assert names
        assert weights(conv.converted) != given
        return names

    monkeypatch.setattr(SimulatedBackend, "commit", committed)
    report = _refined(conv, _simulated(device, loss=treacherous, equalize=False))
    assert confirming
    assert report.status is cptv_ao.Status.REJECTED
    assert report.moves == ()
    assert report.after == report.before
    assert any("rejected: on the kernels it went from" in note for note in report.notes)
    assert weights(conv.converted) == given


def test_nothing_found_leaves_the_model(conv: Case, device: str) -> None:
    given = weights(conv.converted)
    report = _refined(conv, _simulated(device, max_evaluations=0))
    assert weights(conv.converted) == given
    assert report.after == report.before


def test_same_seed_same_scales(conv: Case, device: str) -> None:
    other = conv.copy()
    config = _simulated(device, evaluations=4, gradient_steps=3)
    _refined(conv, config)
    _refined(other, config)
    assert weights(conv.converted) == weights(other.converted)


@pytest.mark.parametrize("at", ["callback", "commit", "kernels"])
def test_restored_on_any_exception(conv: Case, device: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = everything(conv.converted)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    commit = SimulatedBackend.commit
    if at == "commit":
        monkeypatch.setattr(SimulatedBackend, "commit", lambda self: [*commit(self), fail()])
    if at == "kernels":
        losses, confirming = SplitEvaluators.losses, iter((False, True))
        monkeypatch.setattr(SplitEvaluators, "losses", lambda self: fail() if next(confirming) else losses(self))
    with pytest.raises(KeyboardInterrupt):
        _refined(conv, _simulated(device, evaluations=8), callback=fail if at == "callback" else None)
    assert everything(conv.converted) == given


def test_a_device_is_for_proposals_too() -> None:
    assert cptv_ao.RefineConfig(device="cuda").score_on == "kernels"
    with pytest.raises(ValueError, match="device: expected a device such as"):
        cptv_ao.RefineConfig(score_on="simulation", device="gpu")
    assert cptv_ao.RefineConfig(score_on="simulation", device="cuda:1").device == "cuda:1"


def test_entries_of_the_twin_are_counted_and_not_copied(conv: Case) -> None:
    backend = Backend(conv.converted)
    pieces = Segments(Twin(backend).module)
    at = pieces.cut(["conv1"])
    values = pieces.start((conv.batches[0],), {}, at)
    quantized = [value for value in values if isinstance(value, QTensor)]
    assert quantized
    for value in quantized:
        assert storages(value)[value.codes.untyped_storage().data_ptr()] == value.codes.untyped_storage().nbytes()
    assert not any(pieces.copies(at))


def test_saturation_is_told_where_it_is_and_only_there(
    conv: Case, vit_w3: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same CPU-independent text: which kernels saturate differs from machine to machine, what is said does not."""
    vit_w3.batches = vit_w3.batches[:2]
    for healthy in (conv, vit_w3):
        assert not any("differ by" in note for note in _refined(healthy, small_config()).notes)
    monkeypatch.setattr(kernel_agreement, "disagreement", lambda *_: 0.27)
    monkeypatch.setattr(kernel_agreement, "saturating_inputs", lambda *_: dict.fromkeys("adcb", 200))
    (note,) = [n for n in _refined(conv, small_config()).notes if "differ by" in n]
    assert note.startswith("kernels and exact arithmetic differ by 27 % on the outputs of the model that was given")
    for part in ("a, b, c and 1 more", "reduce_range=True", "VNNI", "on these kernels"):
        assert part in note
    (note,) = [n for n in _refined(conv, _simulated("cpu")).notes if "differ by" in n]
    assert "does not see it" in note
    monkeypatch.setattr(kernel_agreement, "saturating_inputs", lambda *_: {})
    (note,) = [n for n in _refined(conv, small_config()).notes if "differ by" in n]
    assert "no kernel saturates" in note
    assert "VNNI" not in note


SATURATING = """
import torch
from helpers import nets
from torch import nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
from cptv_ao.simulation.kernel_agreement import agreement_notes
from cptv_ao.backends.backend import Backend
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.batches import Batch
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
with torch.no_grad():
    for layer in (model[0], model[2]):
        layer.weight.fill_(0.1)
weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
full = QConfig(activation=MinMaxObserver.with_args(reduce_range=False), weight=weight)
batch = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
_, converted = nets.quantize(model, [batch], engine="onednn", mapping=QConfigMapping().set_global(full))
(note,) = agreement_notes(Backend(converted), Batch((batch,), {}, 32), RefineConfig())
print(note)
"""


@pytest.mark.slow
@pytest.mark.skipif("onednn" not in torch.backends.quantized.supported_engines, reason="needs the onednn engine")
def test_saturation_is_found() -> None:
    """Without VNNI oneDNN adds pairs of 8-bit products in 16 bits."""
    tests = Path(__file__).parents[1]
    environment = dict(
        os.environ, ONEDNN_MAX_CPU_ISA="AVX2", PYTHONPATH=os.pathsep.join([str(tests.parent), str(tests)])
    )
    command = [sys.executable, "-W", "ignore", "-c", SATURATING]
    note = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "kernels of this CPU saturate on the activations of " in note
    assert "reduce_range=True" in note
