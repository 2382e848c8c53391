"""`diagnose` finds what was planted, measures what a hand computes, and leaves the model alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import workloads
from helpers import nets, pt2e
from helpers.cases import Case, reference_case, vit_case
from helpers.diagnosed import block, diagnosed, rescale, site
from helpers.quick import some
from helpers.search import exact_kl, small_config
from helpers.state import everything
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver, QConfig, QConfigMapping
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.qparams import QParams
from cptv_ao.diagnosis import attribution
from cptv_ao.fx.node_runner import Recorder
from cptv_ao.simulation.twin import Twin


@pytest.fixture(scope="module")
def _vit_w8(vit: nn.Module, digits: workloads.Images) -> Case:
    case = vit_case(vit, digits, 8)
    return Case(case.float_model, case.prepared, case.converted, case.batches[:2])


@pytest.fixture
def vit_w8(_vit_w8: Case) -> Case:
    return _vit_w8.copy()


@pytest.fixture(name="vit_w3")
def _fewer_images(vit_w3: Case) -> Case:
    """A quarter of them, to be quick."""
    del vit_w3.batches[1:]
    return vit_w3


# what was planted comes first


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("blocks.1.attn.qkv.output", 8),
        pytest.param("blocks.2.norm2.scale_0", 32, marks=pytest.mark.slow),
        pytest.param("blocks.0.mlp.fc2.output", 32, marks=pytest.mark.slow),
    ],
)
def test_a_coarse_activation_comes_first(vit_w8: Case, name: str, factor: int) -> None:
    rescale(vit_w8, name, factor)
    found = diagnosed(vit_w8)
    assert found.blocks[0].name == name[: len("blocks.0")]
    assert found.sites[0].name == name
    assert found.blocks[0].share > 0.5
    assert found.sites[0].share > 0.5
    assert found.sites[0].used < 0.55 / factor + 2 / 256
    assert found.advice[0].startswith(f"{found.blocks[0].name} causes ")
    assert f"nearly all of it from {name}, which uses " in found.advice[0]
    assert found.advice[0].endswith(": run refine")


def test_an_activation_that_clips_comes_first(vit_w8: Case) -> None:
    name = "blocks.3.mlp.fc1.output"
    rescale(vit_w8, name, 1 / 8)
    found = diagnosed(vit_w8)
    assert (found.blocks[0].name, found.sites[0].name) == ("blocks.3", name)
    assert found.sites[0].clipped > 0.05
    assert "which clips " in found.advice[0]


def test_a_weight_with_few_bits_comes_first(vit: nn.Module, digits: workloads.Images) -> None:
    batches = list(digits.calibration(64, seed=0).split(32))
    mapping = cptv_ao.qconfig_mapping(weight_bits=8, engine="x86")
    few = cptv_ao.qconfig_mapping(weight_bits=2, engine="x86").global_qconfig
    mapping.set_module_name("blocks.2.mlp.fc1", few)
    _, converted = nets.quantize(vit, batches, mapping=mapping)
    found = cptv_ao.diagnose(converted, batches, float_model=vit, progress=False)
    assert (found.blocks[0].name, found.sites[0].name) == ("blocks.2", "blocks.2.mlp.fc1.weight")


def test_in_a_pt2e_graph() -> None:
    model, converted = pt2e.small_model()
    name = "fc1.input"
    backend = Backend(converted)
    now = backend.read(name)
    backend.write(name, QParams(now.scale * 8, now.zero_point))
    found = cptv_ao.diagnose(converted, pt2e.BATCHES, float_model=model, progress=False)
    assert found.sites[0].name == name
    assert found.sites[0].used < 0.2
    assert found.loss == pytest.approx(found.simulated, rel=1e-3)
    assert found.blocks[0].share > 0.9


def test_a_reference_model_is_that_which_it_lowers_to(conv: Case) -> None:
    """Also without a float model: it holds its float weights itself."""
    case = reference_case()
    given = everything(case.converted)
    found = diagnosed(case)
    assert everything(case.converted) == given
    assert found.to_dict() == diagnosed(conv).to_dict()
    alone = cptv_ao.diagnose(case.converted, case.batches, progress=False)
    assert alone.notes == ()
    assert alone.loss == pytest.approx(found.loss, rel=1e-3)
    assert site(alone, "fc1.weight").sqnr == pytest.approx(site(found, "fc1.weight").sqnr)


# what a hand computes


def test_an_activation_by_hand(vit_w8: Case) -> None:
    name = "blocks.1.mlp.fc1.output"
    rescale(vit_w8, name, 0.4)
    qparams = Backend(vit_w8.converted).read(name)
    values: list[Tensor] = []
    layer = vit_w8.float_model.get_submodule("blocks.1.mlp.fc1")
    hook = layer.register_forward_hook(lambda _, __, output: values.append(output))
    with torch.no_grad():
        for batch in vit_w8.batches:
            vit_w8.float_model(batch)
    hook.remove()
    x = torch.cat(values).double()
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    codes = torch.round(x / scale) + zero_point
    kept = codes.clamp(0, 255)
    got = site(diagnosed(vit_w8), name)
    assert got.clipped == pytest.approx(float(((codes < 0) | (codes > 255)).double().mean()), abs=2e-5)
    assert got.clipped > 0.001, "else it says nothing"
    assert got.used == pytest.approx(float(kept.max() - kept.min() + 1) / 256)
    noise = ((kept - zero_point) * scale - x).square().sum()
    assert got.sqnr == pytest.approx(float(10 * torch.log10(x.square().sum() / noise)), abs=1e-2)
    largest = x.abs().amax((0, 1))
    assert got.outlier == pytest.approx(float(largest.max() / largest.median()), rel=1e-4)
    assert got.outlier_channels == int((largest > 4 * largest.median()).sum())


def test_a_weight_by_hand(vit_w3: Case) -> None:
    name = "blocks.1.mlp.fc2"
    backend = Backend(vit_w3.converted)
    attach_float_weights(backend, vit_w3.float_model)
    now = backend.read(f"{name}.weight")
    backend.write(f"{name}.weight", QParams(now.scale * 0.5, now.zero_point))
    weight = vit_w3.float_model.get_submodule(name).weight.detach().double()  # type: ignore[union-attr]
    codes = backend.weight(f"{name}.weight").int_repr().double()
    scale = (now.scale * 0.5).float().double()[:, None]
    got = site(diagnosed(vit_w3), f"{name}.weight")
    away = (weight / scale).abs()
    assert got.clipped == pytest.approx(
        float(((weight / scale > 3.502) | (away > 4.502) & (weight < 0)).double().mean())
    )
    assert got.clipped > 0.03
    noise = (codes * scale - weight).square().sum()
    assert got.sqnr == pytest.approx(float(10 * torch.log10(weight.square().sum() / noise)))
    assert got.used == pytest.approx(float(((codes.amax(1) - codes.amin(1) + 1) / 8).mean()))


def test_a_block_by_hand(vit_w3: Case) -> None:
    """Its output is that of the float model's module, its loss that of a twin with the block in float."""
    found = diagnosed(vit_w3)
    given = block(found, "blocks.1")
    wanted: list[Tensor] = []
    module = vit_w3.float_model.get_submodule("blocks.1")
    hook = module.register_forward_hook(lambda _, __, output: wanted.append(output.flatten(1)))
    got = []
    with torch.no_grad():
        teacher = [vit_w3.float_model(batch) for batch in vit_w3.batches]
        for batch in vit_w3.batches:
            recorder = Recorder(vit_w3.converted)
            recorder.run(batch.clone(), None, False)
            got.append(recorder.values[given.node].dequantize().flatten(1))
    hook.remove()
    a, b = torch.cat(got).double(), torch.cat(wanted).double()
    assert given.sqnr == pytest.approx(float(10 * torch.log10(b.square().sum() / (a - b).square().sum())), abs=1e-3)
    assert given.cosine == pytest.approx(float(functional.cosine_similarity(a, b).mean()), abs=1e-6)

    backend = Backend(vit_w3.converted)
    attach_float_weights(backend, vit_w3.float_model)
    twin = Twin(backend)
    names = [s.name for s in found.sites if s.block == "blocks.1"]
    assert len(names) == given.sites == 16
    with torch.no_grad():
        whole = torch.stack([exact_kl(twin(batch), t) for batch, t in zip(vit_w3.batches, teacher, strict=True)]).mean()
        with twin.in_float(names):
            pairs = zip(vit_w3.batches, teacher, strict=True)
            without = torch.stack([exact_kl(twin(batch), t) for batch, t in pairs]).mean()
    assert found.simulated == pytest.approx(float(whole), rel=1e-5)
    assert given.loss_without == pytest.approx(float(without), rel=1e-5)
    assert given.share == pytest.approx(float((whole - without) / whole), rel=1e-4)


@pytest.mark.slow
def test_a_block_in_float_is_what_torch_leaves_in_float(vit_w2: Case, vit: nn.Module) -> None:
    """The oracle is a conversion in which the qconfig of the block is None."""
    given = block(diagnosed(vit_w2), "blocks.1")
    activation = HistogramObserver.with_args(reduce_range=True)  # as of `workloads.quantize`
    weight = nets.qconfig(2).weight
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    mapping.set_module_name("blocks.1", None)
    _, partly = nets.quantize(vit, vit_w2.batches[:2], mapping=mapping)
    with torch.no_grad():
        losses = [float(exact_kl(partly(batch), vit(batch))) for batch in vit_w2.batches]
    assert given.loss_without == pytest.approx(sum(losses) / len(losses), rel=0.1)
    assert given.share > 0.15


# the loss


@pytest.mark.parametrize("loss", some("infonce", others=["mse"]))
def test_shares_are_of_what_can_go_away(vit_w2: Case, loss: Any) -> None:
    """InfoNCE of the teacher against itself is not 0."""
    del vit_w2.batches[1:]
    found = diagnosed(vit_w2, config=cptv_ao.RefineConfig(loss=loss))
    assert found.loss_name == loss
    assert (found.least > 1) == (loss == "infonce")
    assert found.floor == pytest.approx(found.least, rel=1e-3, abs=1e-6)
    for part in found.blocks:
        assert part.share == pytest.approx((found.simulated - part.loss_without) / (found.simulated - found.least))
    assert found.blocks[0].share > 0.2
    assert [b.share for b in found.blocks] == sorted((b.share for b in found.blocks), reverse=True)


def test_the_loss_is_that_of_the_kernels(case: Case) -> None:
    found = diagnosed(case)
    with torch.no_grad():
        losses = [float(exact_kl(case.converted(b.clone()), case.float_model(b.clone()))) for b in case.batches]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.images == sum(len(b) for b in case.batches)


def test_blocks_are_those_of_the_config(conv: Case) -> None:
    config = cptv_ao.RefineConfig(blocks=lambda sites: {s.name: s.name[:4] for s in sites})
    names = {b.name for b in diagnosed(conv, config=config).blocks}
    assert names == {s[:4] for s in cptv_ao.find_sites(conv.converted)}


@pytest.mark.slow
def test_without_a_float_model(vit_w3: Case) -> None:
    found = diagnosed(vit_w3, float_model=None)
    assert any("errors of its weights are not seen" in note for note in found.notes)
    weight = site(found, "blocks.1.mlp.fc1.weight")
    assert (weight.sqnr, weight.clipped, weight.share) == (None, None, None)
    assert weight.used > 0.9
    assert found.loss < diagnosed(vit_w3).loss / 2
    assert site(found, "blocks.1.mlp.fc1.output").sqnr is not None


def test_the_prepared_model_is_a_float_model(conv: Case) -> None:
    by_float, by_prepared = diagnosed(conv), diagnosed(conv, float_model=conv.prepared)
    assert by_prepared.loss == pytest.approx(by_float.loss, rel=1e-3)
    assert [s.name for s in by_prepared.sites] == [s.name for s in by_float.sites]
    assert site(by_prepared, "conv1.weight").sqnr == pytest.approx(site(by_float, "conv1.weight").sqnr)


def test_the_tail_is_the_whole(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses without a block come from cached entries; without the cache they are the same."""
    cached = diagnosed(small)
    plain = diagnosed(small, config=cptv_ao.RefineConfig(cache_bytes=0))
    assert cached.blocks == plain.blocks
    assert cached.sites == plain.sites


def test_after_refine_it_says_so(conv: Case) -> None:
    refined = cptv_ao.refine(
        conv.converted, conv.batches, float_model=conv.float_model, config=small_config(), progress=False
    )
    found = cptv_ao.diagnose(refined, conv.batches, float_model=conv.float_model, progress=False)
    assert any("refine has been run already" in sentence for sentence in found.advice)


def test_many_sites_are_tried_for_the_worst_blocks_first(vit_w3: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_SITES", 20)
    found = diagnosed(vit_w3)
    tried = [s for s in found.sites if s.share is not None]
    assert len(tried) == 20
    assert {s.block for s in tried} <= {b.name for b in found.blocks[:3]}
    assert found.sites[:20] == tuple(tried)


def test_the_bar(conv: Case, capsys: pytest.CaptureFixture[str]) -> None:
    diagnosed(conv)
    assert capsys.readouterr().err == ""
    diagnosed(conv, progress=True)
    assert "diagnose: 100%" in capsys.readouterr().err


def test_keyword_inputs_and_several_outputs() -> None:
    model = nets.seeded(lambda: nets.TupleNet(True))
    batches = list(nets.images(16, 6).split(4))
    _, converted = nets.quantize(model, batches, weight_bits=3)
    by_position = cptv_ao.diagnose(converted, batches, float_model=model, progress=False)
    by_name = cptv_ao.diagnose(converted, [{"x": b} for b in batches], float_model=model, progress=False)
    assert by_name == by_position
    config = cptv_ao.RefineConfig(output=lambda found: found["hidden"])
    hidden = cptv_ao.diagnose(converted, batches, float_model=model, config=config, progress=False)
    assert hidden.loss != by_name.loss
    assert site(hidden, "b.weight").share == 0, "the hidden layer comes before it"
    assert site(by_name, "b.weight").share != 0


def test_a_pt2e_graph_of_one_batch_size() -> None:
    model = nets.seeded(lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)))
    batches = list(nets.images(300, 12).split(50))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = pt2e.torchao().prepare_pt2e(pt2e.exported(model, (batches[0],)), pt2e.x86())
        for batch in batches:
            prepared(batch)
        converted = pt2e.torchao().convert_pt2e(prepared)
    found = cptv_ao.diagnose(converted, batches, float_model=model, progress=False)
    assert found.images == 150
    assert found.findings.saturation_risk == ("0.input", "2.input")
