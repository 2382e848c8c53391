"""PT2E graphs (`torchao.quantization.pt2e`): the same call, config and report, and the same promises."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import workloads
from helpers import nets
from helpers.cases import Case
from helpers.pt2e import BATCHES, Residual, converted, per_tensor, refine, torchao, x86, xnnpack
from helpers.quick import some
from helpers.search import small_config
from helpers.state import everything
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import kl
from cptv_ao.core.qparams import QParams
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.simulation.twin import Twin

torchao()


FORMS = {
    "x86": (x86, True), "x86, weights not folded": (x86, False), "xnnpack": (xnnpack, True),
    "xnnpack per tensor": (per_tensor, True), "xnnpack per tensor, not folded": (per_tensor, False),
}  # fmt: skip


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return nets.seeded(Residual)


@pytest.fixture(scope="module")
def models(float_model: nn.Module) -> dict[str, GraphModule]:
    return {name: converted(float_model, make(), fold) for name, (make, fold) in FORMS.items()}


@pytest.fixture(params=some("x86", "xnnpack per tensor, not folded", others=FORMS))
def model(request: pytest.FixtureRequest, models: dict[str, GraphModule]) -> GraphModule:
    return copy.deepcopy(models[request.param])


@pytest.fixture
def folded(models: dict[str, GraphModule]) -> GraphModule:
    return copy.deepcopy(models["x86"])


def output(model: nn.Module, batch: Tensor = BATCHES[0]) -> Tensor:
    with torch.no_grad():
        return model(batch)["logits"]


def test_every_scale_is_found(model: GraphModule) -> None:
    sites = cptv_ao.find_sites(model)
    assert sites.unknown == ()
    weights = [name for name, site in sites.items() if site.kind == "weight"]
    assert weights == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert "conv1.input" in sites
    assert all(site.qmin in (0, -128, -127) and site.qmax in (127, 255) for site in sites.values())


def test_the_twin_is_the_graph(model: GraphModule) -> None:
    twin = Twin(Backend(model))
    with torch.no_grad():
        assert torch.equal(twin(BATCHES[0])["logits"], output(model))
        assert set(twin(BATCHES[0])) == {"logits", "hidden"}


def test_what_was_written_is_read_and_undone(model: GraphModule, float_model: nn.Module) -> None:
    from cptv_ao.backends.float_weights import attach_float_weights

    backend = Backend(model)
    attach_float_weights(backend, float_model)
    before, given = backend.snapshot(), output(model)
    for name, site in backend.sites.items():
        now = backend.read(name)
        wanted = QParams((now.scale * 1.3).float().double(), now.zero_point)
        backend.write(name, wanted)
        assert torch.equal(backend.read(name).scale, wanted.scale)
        if site.nodes and site.kind == "weight":
            assert int(backend.weight(name).int_repr().max()) <= site.qmax
        assert not torch.equal(output(model), given), name
        backend.restore_all(before)
        assert torch.equal(output(model), given)


class Deep(nn.Module):
    """Many norms and linear layers, whose inputs can be centred."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()) for _ in range(layers))
        with torch.no_grad():
            for block in self.blocks:
                block[0].bias += torch.arange(8.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.flatten(1)[:, :8]
        for block in self.blocks:
            x = x + block(x)
        return {"logits": x}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs whose code was generated, each time that it was."""
    seen: list[GraphModule] = []
    recompile = GraphModule.recompile

    def count(self: GraphModule) -> Any:
        seen.append(self)
        return recompile(self)

    monkeypatch.setattr(GraphModule, "recompile", count)
    return seen


@pytest.mark.slow
def test_code_is_generated_as_often_however_many_scales_are_written(
    compilations: list[GraphModule], tmp_path: Path
) -> None:
    counts = []
    for layers in (2, 8):
        float_model = nets.seeded(lambda n=layers: Deep(n))
        model = converted(float_model, xnnpack(), True)
        fresh = copy.deepcopy(model)
        compilations.clear()
        report = refine(model, float_model, loss="mse", holdout=0.0)
        assert len(report.moves) > layers
        cptv_ao.save_scales(model, tmp_path / "scales")
        cptv_ao.load_scales(fresh, tmp_path / "scales")
        counts.append((compilations.count(model), compilations.count(fresh)))
        assert torch.equal(output(fresh), output(model))
        assert torch.equal(output(copy.deepcopy(model)), output(model)), "the code says what the graph says"
    assert counts[0] == counts[1], counts
    assert counts[1][1] == 1


def test_code_and_graph_say_the_same_wherever_it_is_interrupted(
    folded: GraphModule, float_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in one compilation of the graph after another: what was written is undone, in its code as well."""
    given, code, recompile = output(folded), folded.code, GraphModule.recompile
    stop, stopped = 1, True
    while stopped:
        left, stopped = stop, False

        def interrupt(self: GraphModule) -> Any:
            nonlocal left, stopped
            left -= self is folded
            if self is folded and left == 0:
                stopped = True
                raise KeyboardInterrupt
            return recompile(self)

        monkeypatch.setattr(GraphModule, "recompile", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            refine(folded, float_model)
        if stopped:
            assert folded.code == code
            assert torch.equal(output(folded), given)
            assert torch.equal(output(copy.deepcopy(folded)), given)
        stop += 1
    assert stop > 2, "it never compiled"
    assert not torch.equal(output(folded), given)


def test_refine_is_never_worse_and_keeps_its_word(model: GraphModule, float_model: nn.Module) -> None:
    before = copy.deepcopy(model)
    report = refine(model, float_model, loss="mse", holdout=0.25)
    assert report.after.search < report.before.search
    assert report.after.holdout is not None
    assert report.before.holdout is not None
    assert report.after.holdout <= report.before.holdout
    assert "weight" in {move.kind for move in report.moves}
    search = [Batch((b,), {}, len(b)) for b in BATCHES[:3]]
    for state, losses in ((before, report.before), (model, report.after)):
        scored = [float((output(state, b.args[0]) - output(float_model, b.args[0])).square().mean()) for b in search]
        assert sum(scored) / 3 == pytest.approx(losses.search, rel=1e-4)


def test_the_tail_is_the_full_forward(model: GraphModule, float_model: nn.Module) -> None:
    twin = Twin(Backend(model))
    batches = [Batch((b,), {}, len(b)) for b in BATCHES]
    targets = teacher_outputs(float_model, batches)
    evaluator = Evaluator(twin.module, batches, targets, kl)
    full = evaluator.score()
    for site in Backend(model).sites.values():
        evaluator.enter(site.nodes)
        assert evaluator.score() == pytest.approx(full, rel=1e-6)
        evaluator.leave()


def test_it_is_deterministic(models: dict[str, GraphModule], float_model: nn.Module) -> None:
    results = []
    for _ in range(2):
        model = copy.deepcopy(models["x86"])
        refine(model, float_model)
        results.append(output(model))
    assert torch.equal(*results)


def test_it_is_untouched_after_an_exception(model: GraphModule, float_model: nn.Module) -> None:
    given, code = output(model), model.code

    def stop(event: cptv_ao.Event) -> None:
        if event.kind == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cptv_ao.refine(model, BATCHES, float_model=float_model, config=small_config(), callback=stop, progress=False)
    assert torch.equal(output(model), given)
    assert model.code == code
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), model.buffers(), strict=True))


def test_the_exported_float_model_will_do(folded: GraphModule, float_model: nn.Module) -> None:
    exported = torch.export.export(float_model, (BATCHES[0],)).module()
    report = refine(folded, exported)
    assert any(move.kind == "weight" for move in report.moves)


def test_weights_that_are_not_folded_need_no_float_model(models: dict[str, GraphModule]) -> None:
    model = copy.deepcopy(models["x86, weights not folded"])
    with pytest.warns(cptv_ao.CptvWarning, match="without float_model"):
        report = refine(model, None)
    assert any(move.kind == "weight" for move in report.moves)


def test_export_keeps_what_was_found(folded: GraphModule, float_model: nn.Module) -> None:
    refine(folded, float_model)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(folded, (BATCHES[0],)), buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.export.load(buffer).module()), output(folded))
    assert torch.equal(output(copy.deepcopy(folded)), output(folded))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_state_dict_does_not_hold_its_activation_scales_and_the_report_says_so(
    folded: GraphModule, float_model: nn.Module, tmp_path: Path
) -> None:
    fresh, again = copy.deepcopy(folded), copy.deepcopy(folded)
    report = refine(folded, float_model)
    assert any(move.kind == "activation" for move in report.moves)
    fresh.load_state_dict(folded.state_dict())
    assert not torch.equal(output(fresh), output(folded))
    told = [note for note in report.notes if note.startswith("saving: the scales of activations are numbers")]
    assert len(told) == 1 and "save_scales / load_scales" in told[0]
    cptv_ao.save_scales(folded, tmp_path / "scales")
    assert torch.equal(output(cptv_ao.load_scales(again, tmp_path / "scales")), output(folded))


@pytest.mark.slow
def test_the_refined_model_compiles(folded: GraphModule, float_model: nn.Module) -> None:
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # as torchao's documentation asks for
        products = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
        report = refine(folded, float_model, accept_on=torch.compile, loss="mse")
        assert counters["inductor"]["qlinear_weight_prepack_matcher_count"] > products, "of integers"
        compiled = torch.compile(folded)(BATCHES[0])["logits"]
    torch.testing.assert_close(compiled, output(folded), rtol=1e-3, atol=1e-4)
    assert report.after.search < report.before.search


@pytest.mark.parametrize("spoiled", [False, True])
def test_what_ships_accepts(folded: GraphModule, float_model: nn.Module, spoiled: bool) -> None:
    given, made = output(folded), []

    def ship(model: Any) -> Any:
        made.append(model)
        factor = 3.0 if spoiled and len(made) > 1 else 1.0
        return lambda x: {"logits": model(x)["logits"] * factor}

    report = refine(folded, float_model, accept_on=ship)
    assert len(made) == 2
    assert folded not in made
    if spoiled:
        assert report.status is cptv_ao.Status.REJECTED
        assert torch.equal(output(folded), given)
    else:
        assert report.after.search < report.before.search


def test_a_search_on_the_kernels_is_accepted_there(conv: Case) -> None:
    config = small_config(accept_on=torch.compile)
    with pytest.raises(ValueError, match=r"accept_on: .* score_on='simulation'"):
        cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)


@pytest.mark.slow
def test_activations_below_8_bits_are_real(vit: nn.Module, digits: workloads.Images) -> None:
    batches = digits.calibration(400, seed=0).split(50)
    model = workloads.quantize_exported(vit, batches, weight_bits=3, activation_bits=3)
    sites = cptv_ao.find_sites(model)
    assert {(site.kind, site.qmin, site.qmax) for site in sites.values()} == {
        ("weight", -4, 3),
        ("activation", 0, 7),
    }
    before = workloads.agreement(workloads.logits(model, digits.test), workloads.logits(vit, digits.test))
    config = cptv_ao.RefineConfig(gradient_steps=100, passes=0)
    cptv_ao.refine(model, batches, float_model=vit, config=config, progress=False)
    after = workloads.agreement(workloads.logits(model, digits.test), workloads.logits(vit, digits.test))
    report = cptv_ao.report(model)
    assert report.after.search < 0.5 * report.before.search
    assert after > before


@pytest.mark.slow
def test_the_package_is_imported_where_torch_ao_is_absent() -> None:
    absent = "import sys; sys.modules['torch.ao.quantization.fx'] = None"
    subprocess.run([sys.executable, "-c", f"{absent}; import cptv_ao; cptv_ao.RefineConfig()"], check=True)


class Branches(nn.Module):
    """Convolutions with nothing but a weight, and a value that two layers read, the later one in the code first."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.first, self.second = kind(3, 8, 1, bias=False), kind(8, 8, 3, bias=False)
        self.norm, self.a, self.b, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.weight[3] = 40

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.second(self.first(x).relu()).flatten(2).mean(2))
        late = self.b(x)
        return {"logits": self.head((self.a(x) + late).relu())}


def branches(rank: int, fold: bool = True) -> tuple[nn.Module, list[Tensor], GraphModule]:
    float_model = nets.seeded(lambda: Branches(rank), random_norms=False)
    batches = [nets.images(6, 3, *[6] * rank, seed=seed) for seed in range(4)]
    return float_model, batches, converted(float_model, x86(), fold, batches)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_with_nothing_but_a_weight(rank: int) -> None:
    float_model, batches, graph = branches(rank)
    assert torch.equal(Twin(Backend(graph))(batches[0])["logits"], output(graph, batches[0]))
    config = small_config(population=("curvature",), gradient_steps=8)
    cptv_ao.refine(graph, batches, float_model=float_model, config=config, progress=False)
    report = cptv_ao.report(graph)
    assert report.stages and not any("no proposals" in note for note in report.notes)
    assert report.after.search <= report.before.search


def test_a_copy_has_the_same_names() -> None:
    """Though its nodes hold their readers in another order."""
    float_model, batches, graph = branches(2)
    wanted = list(cptv_ao.find_sites(graph))
    assert wanted == list(cptv_ao.find_sites(copy.deepcopy(graph)))
    again = torch.export.export(graph, (batches[0],), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=1024)},))
    assert wanted == list(cptv_ao.find_sites(again.module()))
    (name,) = [name for name in wanted if name in {"a.input", "b.input"}]
    config = small_config(include=(name,), population=("curvature",))
    for inplace in (True, False):
        cptv_ao.refine(graph, batches, float_model=float_model, config=config, progress=False, inplace=inplace)


@pytest.mark.parametrize("fold", [True, False])
def test_scales_of_a_folded_graph_and_of_one_that_is_not(fold: bool, tmp_path: Path) -> None:
    """Codes, too, where the graph rounds a float weight: equal forms and learned roundings are nowhere else."""
    float_model, batches, graph = branches(2, fold)
    other = branches(2, not fold)[2]
    given = dict(other.named_parameters())
    values = {name: value.detach().clone() for name, value in given.items()}
    config = small_config(gradient_steps=30, holdout=0)
    refined = cptv_ao.refine(graph, batches, float_model=float_model, config=config, progress=False, inplace=False)
    assert cptv_ao.report(refined).moves
    cptv_ao.save_scales(refined, tmp_path / "scales")
    cptv_ao.load_scales(other, tmp_path / "scales")
    assert torch.equal(output(other, batches[0]), output(refined, batches[0]))
    assert all(torch.equal(given[name], value) for name, value in values.items()), "of the float model, perhaps"


def test_a_weight_that_something_else_reads_takes_no_codes(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.first(x).relu()) + self.head.weight.sum(0)}

    float_model, batches = nets.seeded(Tied), [nets.images(6, 6, seed=seed) for seed in range(4)]
    folded, graph = (converted(float_model, x86(), fold, batches) for fold in (True, False))
    backend, before = Backend(folded), everything(graph)
    codes = backend.weight("head.weight").int_repr()
    backend.write_exactly("head.weight", backend.read("head.weight"), codes.clamp(-100, 100))
    cptv_ao.save_scales(folded, tmp_path / "scales")
    with pytest.raises(cptv_ao.UnsupportedModelError, match=r"head.weight: .*; convert with fold_quantize=True"):
        cptv_ao.load_scales(graph, tmp_path / "scales")
    assert everything(graph) == before


def test_code_ranges_are_those_of_the_graph(folded: GraphModule, float_model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"enforces the code ranges of its own nodes, \[\(-128, 127\)\]"):
        refine(folded, float_model, weight_range=(-8, 7))
    refine(folded, float_model, weight_range=(-128, 127))
