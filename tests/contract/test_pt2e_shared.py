"""PT2E graphs that are not a chain of layers: modules called twice, tied weights, constants, dynamic quantization, and
calibration images that say little."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.quick import each_value
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.simulation.twin import Twin

torchao = pt2e.torchao()

BATCHES = list(nets.images(32, 12).split(8))
IMAGES = list(nets.images(16, 3, 6, 6).split(4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu()).relu())


class Tied(Twice):
    """Two layers that share a weight but not a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(12, 12)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x).relu()).relu())


class ConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.conv(self.conv(x).relu()).mean((2, 3)))


class Constants(Twice):
    """A position embedding and a class token, which quantizers put on scales of activations, and a functional layer."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token = nn.Parameter(torch.randn(1, 12)), nn.Parameter(torch.randn(1, 1, 12))
        self.weight = nn.Parameter(torch.randn(12, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.a(x) + self.position)[:, None]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.b(functional.linear(x, self.weight)).mean(1)


class Normed(Twice):
    """A norm that a linear layer reads: its channels may be moved to the middle of their ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).relu()))


class Several(nn.Module):
    """Two inputs and three outputs, one of which nobody wants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.a(x) + self.b(y), self.a(x).relu(), x.argmax(1)


def x86(dynamic: bool = False) -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as room

    return room.X86InductorQuantizer().set_global(room.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))


def xnnpack(dynamic: bool = False, per_channel: bool = True) -> Any:
    from torchao.testing.pt2e import _xnnpack_quantizer as room

    config = room.get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=dynamic)
    return room.XNNPACKQuantizer().set_global(config)


def quantized(model: nn.Module, batches: list[Any], quantizer: Any, fold: bool = True, fixed: bool = False) -> Any:
    inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        dynamic = None if fixed else tuple({0: torch.export.Dim("batch", min=1, max=1024)} for _ in inputs[0])
        prepared = torchao.prepare_pt2e(pt2e.exported(model, inputs[0], dynamic_shapes=dynamic), quantizer)
        for batch in inputs:
            prepared(*batch)
        return torchao.convert_pt2e(prepared, fold_quantize=fold)


def error(model: nn.Module, float_model: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.cat([model(batch) - float_model(batch) for batch in batches]).square().mean())


def refine(graph: GraphModule, float_model: nn.Module | None, batches: Any, **changes: Any) -> cptv_ao.Report:
    settings = {"evaluations": 2, "gradient_steps": 12, "loss": "mse", "holdout": 0, "population": ("output_error",)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cptv_ao.CptvWarning)
        config = small_config(**(settings | changes))
        cptv_ao.refine(graph, batches, float_model=float_model, config=config, progress=False)
    return cptv_ao.report(graph)


class Values(torch.fx.Interpreter):
    """What each node of a graph gives."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Any) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


QUANTIZERS = {
    "x86": x86, "xnnpack": xnnpack, "per tensor": lambda: xnnpack(per_channel=False),
    "dynamic x86": lambda: x86(dynamic=True), "dynamic xnnpack": lambda: xnnpack(dynamic=True),
}  # fmt: skip
NETS = [Twice, Tied, Constants, Normed, ConvTwice]


@pytest.mark.parametrize(
    ("net", "quantizer", "fold", "with_float_model"), each_value(NETS, QUANTIZERS, [True, False], [True, False])
)
def test_refined_and_diagnosed(net: Any, quantizer: str, fold: bool, with_float_model: bool) -> None:
    if net is ConvTwice and "x86" in quantizer:
        pytest.skip("X86InductorQuantizer refuses it")
    batches = IMAGES if net is ConvTwice else BATCHES
    model = nets.seeded(net)
    graph = quantized(model, batches, QUANTIZERS[quantizer](), fold)
    with torch.no_grad():
        assert torch.equal(Twin(Backend(graph))(batches[0]), graph(batches[0]))
    before = error(graph, model, batches)
    report = refine(graph, model if with_float_model else None, batches)
    if with_float_model:
        assert report.before.search == pytest.approx(before, rel=1e-3)
        assert report.after.search == pytest.approx(error(graph, model, batches), rel=1e-3)
    assert report.after.search <= report.before.search
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cptv_ao.CptvWarning)
        cptv_ao.diagnose(graph, batches, float_model=model if with_float_model else None, progress=False)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("net", [Twice, Tied])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_shared_weight_is_one_site_that_every_call_follows(net: Any, per_channel: bool, fold: bool) -> None:
    model = nets.seeded(net)
    graph = quantized(model, BATCHES, xnnpack(per_channel=per_channel), fold)
    backend = Backend(graph)
    attach_float_weights(backend, model)
    sites = [site for site in backend.sites.values() if site.kind == "weight"]
    assert sorted(len(site.nodes) for site in sites) == [1, 2]
    shared = max(sites, key=lambda site: len(site.nodes))
    now, before = backend.read(shared.name), backend.snapshot()
    with torch.no_grad():
        given = graph(BATCHES[0])
        backend.write(shared.name, cptv_ao.QParams(now.scale * 3, now.zero_point))
        values = Values(graph)
        values.run(BATCHES[0])
        for node in (node for node in graph.graph.nodes if node.name in shared.nodes):  # each call has it
            assert torch.equal(values.seen[node.args[1].name], backend.weight(shared.name).dequantize())
        assert torch.equal(Twin(backend)(BATCHES[0]), graph(BATCHES[0]))
        assert not torch.equal(graph(BATCHES[0]), given)
        backend.restore_all(before)
        assert torch.equal(graph(BATCHES[0]), given)


@pytest.mark.parametrize("make", [x86, xnnpack])
def test_dynamic_nodes_are_told_and_weights_searched(make: Any) -> None:
    model = nets.seeded(Twice)
    graph = quantized(model, BATCHES, make(dynamic=True))
    sites = cptv_ao.find_sites(graph)
    assert {site.kind for site in sites.values()} == {"weight"}
    assert len(sites.unknown) == 3 and all("choose_qparams" in node for node in sites.unknown)
    report = refine(graph, model, BATCHES, gradient_steps=30)
    assert report.after.search < report.before.search and {move.kind for move in report.moves} == {"weight"}


def test_constants_find_their_values_without_a_module() -> None:
    model = nets.seeded(Constants)
    graph = quantized(model, BATCHES, xnnpack())
    backend = Backend(graph)
    attach_float_weights(backend, model)
    held = [backend.float_weights[name].flatten() for name, site in backend.sites.items() if site.op in ("add", "cat")]
    assert held and all(
        any(torch.equal(value, given.flatten()) for given in (model.position, model.token)) for value in held
    )
    assert torch.equal(backend.float_weights[weight_of(backend)], model.weight)


def weight_of(backend: Backend) -> str:
    """The site of the functional layer's weight."""
    return next(name for name, site in backend.sites.items() if site.op == "linear" and not site.scope)


def test_constants_that_a_float_model_does_not_hold_stay() -> None:
    model, other = nets.seeded(Constants), nets.seeded(Constants)
    graph = quantized(model, BATCHES, xnnpack())
    other.position = nn.Parameter(other.get_parameter("position").detach() + 5)
    backend = Backend(graph)
    attach_float_weights(backend, other)
    assert [name for name, site in backend.sites.items() if name not in backend.float_weights and site.kind == "weight"]
    other.weight = nn.Parameter(other.get_parameter("weight").detach() + 5)
    with pytest.raises(cptv_ao.FloatModelMismatchError, match="its weights are not those that were quantized"):
        attach_float_weights(Backend(graph), other)


LITTLE = {
    "one image": [BATCHES[0][:1]], "two batches of one": [BATCHES[0][:1], BATCHES[0][1:2]],
    "zeros": [torch.zeros(4, 12)] * 3, "all alike": [torch.ones(4, 12)] * 3,
}  # fmt: skip


@pytest.mark.parametrize(("images", "score"), each_value(LITTLE, ["mse", "kl"]))
def test_images_that_say_little(images: str, score: str) -> None:
    """Channels that do not vary have no range, and are not moved to the middle of it."""
    model, batches = nets.seeded(Normed), LITTLE[images]
    for calibrated in (BATCHES, [torch.cat([batch] * 2) for batch in batches]):
        graph = quantized(model, calibrated, x86())
        report = refine(graph, model, batches, loss=score)
        assert report.after.search <= report.before.search
        assert len(batches) == 2 or not [note for note in report.notes if "middle" in note]


@pytest.mark.parametrize("fixed", [True, False])
def test_several_inputs_and_outputs(fixed: bool) -> None:
    model = nets.seeded(Several)
    batches = [(batch, batch.flip(1)) for batch in BATCHES]
    graph = quantized(model, batches, x86(), fixed=fixed)
    keyed = [{"x": x, "y": y} for x, y in batches]
    report = refine(graph, model, keyed, gradient_steps=30)
    assert report.after.search < report.before.search


def test_a_float_model_that_was_exported_and_quantized_in_inference_mode() -> None:
    model = nets.seeded(Normed)
    with torch.inference_mode():
        exported = torch.export.export(model, (BATCHES[0],)).module()
        graph = quantized(model, BATCHES, x86())
    report = refine(graph, exported, BATCHES, gradient_steps=30)
    assert report.after.search < report.before.search


def test_a_scale_that_something_else_than_a_dequantize_node_reads_is_left_alone() -> None:
    graph = quantized(nets.seeded(Twice), BATCHES, x86())
    sites = cptv_ao.find_sites(graph)
    node = next(n for n in graph.graph.nodes if n.name == sites["b.input"].nodes[0])
    back = next(iter(node.users))
    with graph.graph.inserting_before(back):
        viewed = graph.graph.call_function(torch.ops.aten.view.default, (node, [-1, 12]))
    back.args = (viewed, *back.args[1:])
    graph.recompile()
    found = cptv_ao.find_sites(graph)
    assert "b.input" not in found and [text.split(" ")[0] for text in found.unknown] == [node.name, back.name]
    with torch.no_grad():
        assert torch.equal(Twin(Backend(graph))(BATCHES[0]), graph(BATCHES[0]))
    refine(graph, nets.seeded(Twice), BATCHES)
