"""Networks that write in place: no run of any model changes a held batch, and the twin follows what is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.quick import some
from helpers.search import exact_kl, small_config
from torch import Tensor, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import mse
from cptv_ao.diagnosis.code_counts import count_codes
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.fx.aliasing import Memory
from cptv_ao.fx.running import call
from cptv_ao.simulation.kernel_agreement import disagreement
from cptv_ao.simulation.saturation import saturating_inputs
from cptv_ao.simulation.twin import Twin

SETTINGS: dict[str, Any] = {"population": ("output_error", "ranges", "biases"), "gradient_steps": 4, "loss": "auto"}


class Doubling(nn.Module):
    """A leaf of which nothing is known; it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Writing(nn.Module):
    """Two linear layers behind a function that may write into its input."""

    def __init__(self, front: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.front = front
        self.first, self.second, self.inner = nn.Linear(16, 24), nn.Linear(24, 6), nn.Linear(16, 16)
        self.outer = nn.Linear(16, 16)
        self.elu, self.nested = nn.ELU(inplace=True), nn.Sequential(nn.SiLU(inplace=True))
        self.same, self.drop, self.doubling = nn.Identity(), nn.Dropout(inplace=True), Doubling()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(self.front(self, x))))


def normalised(net: Any, x: Tensor) -> Tensor:
    return x.sub_(0.5).div_(0.25)


def other_name(net: Any, x: Tensor) -> Tensor:
    y = x
    x.add_(1)
    return x + y


def result_and_input(net: Any, x: Tensor) -> Tensor:
    y = x.add_(1)
    x.mul_(2)
    return x + y


def function(net: Any, x: Tensor) -> Tensor:
    torch.relu_(x)
    functional.hardtanh_(x, -0.5, 0.5)
    return x.exp_()


def argument(net: Any, x: Tensor) -> Tensor:
    y = functional.silu(x, inplace=True)
    return y + x


def out(net: Any, x: Tensor) -> Tensor:
    torch.add(x, 1, out=x)
    return x - 0.1


def module(net: Any, x: Tensor) -> Tensor:
    y = net.elu(x * 1.0)
    return y + x


def nested(net: Any, x: Tensor) -> Tensor:
    net.nested(x)
    return x * 1.1


def unknown(net: Any, x: Tensor) -> Tensor:
    return net.doubling(x)


def through_view(net: Any, x: Tensor) -> Tensor:
    view = x[:, :2]
    view.mul_(3)
    return x


def under_view(net: Any, x: Tensor) -> Tensor:
    view = x[:, :2]
    x.mul_(3)
    return x + view.sum(1, keepdim=True)


def chunks(net: Any, x: Tensor) -> Tensor:
    query, key = x.chunk(2, 1)
    query.mul_(2)
    return torch.cat([query, key], 1)


def chunked(net: Any, x: Tensor) -> Tensor:
    query, _ = x.chunk(2, 1)
    query.mul_(2)
    return x * 1.5


def view_of_view(net: Any, x: Tensor) -> Tensor:
    view = net.same(x).view(-1, 4, 4).transpose(1, 2)
    view[:, 0].clamp_(0)
    return x * 1.1


def views_again(net: Any, x: Tensor) -> Tensor:
    outer = x[:, :4]
    inner = outer[:, :2]
    inner.mul_(2)
    x.add_(1)
    outer.mul_(3)
    return x + outer.sum(1, keepdim=True) + inner.sum(1, keepdim=True)


def dropout(net: Any, x: Tensor) -> Tensor:
    y, view = net.drop(x), x[:, :3]
    y.add_(1)
    return y + view.sum(1, keepdim=True)


def quantized(net: Any, x: Tensor) -> Tensor:
    y = net.inner(x)
    z = functional.relu(y, inplace=True)
    return z + y


def layer_behind_view(net: Any, x: Tensor) -> Tensor:
    y = net.inner(x)
    view = y.view(-1, 16)
    functional.relu(y, inplace=True)
    return net.outer(view) + y


FRONTS = (
    normalised, other_name, result_and_input, function, argument, out, module, nested, unknown, through_view,
    under_view, chunks, chunked, view_of_view, views_again, dropout, quantized, layer_behind_view,
)  # fmt: skip


def assigned(net: Any, x: Tensor) -> Tensor:
    """What FX cannot trace."""
    x += 1
    x[:, 0] = 0
    x[:, 2:4] *= 2
    x[x < -2] = 1.0
    return x


def prepared(front: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, GraphModule, list[Tensor]]:
    net = nets.seeded(lambda: Writing(front))
    batches = [2 * batch for batch in nets.images(48, 16).split(12)]
    custom = PrepareCustomConfig().set_non_traceable_module_classes([Doubling])
    model = prepare_fx(copy.deepcopy(net), nets.mapping(4), (batches[0].clone(),), prepare_custom_config=custom)
    for batch in batches:
        model(batch.clone())
    return net, model, batches


def as_batch(images: Tensor) -> Batch:
    return Batch((images.clone(),), {}, len(images))


@pytest.mark.parametrize("front", FRONTS, ids=lambda front: front.__name__)
def test_the_twin_is_what_the_kernels_are_and_cuts_change_nothing(front: Callable[[Any, Tensor], Tensor]) -> None:
    _, model, batches = prepared(front)
    converted, batch = convert_fx(model), as_batch(batches[0])
    assert disagreement(converted, Twin(Backend(converted)), [batch]) < 1e-3
    assert torch.equal(batch.args[0], batches[0])
    assert saturating_inputs(converted, Twin(Backend(converted)), batch) == {}
    evaluator = Evaluator(converted, [batch], [torch.zeros(12, 6)], mse)
    whole = evaluator.score()
    for node in converted.graph.nodes:
        if node.op.startswith("call_"):
            evaluator.enter([node.name])
            assert [evaluator.score(), evaluator.score()] == [whole, whole], node.name
            evaluator.leave()
    assert torch.equal(batch.args[0], batches[0])


@pytest.mark.parametrize("other", ["contiguous", "float", "flatten"])
def test_what_cannot_be_followed_is_said(other: str) -> None:
    """Whether these copy depends on layout and dtype: what x is afterwards cannot be told, if it is read."""

    class Uncertain(nn.Module):
        def forward(self, x: Tensor, read: bool) -> Tensor:
            y = getattr(x, other)().exp_()
            return x.sin() + y if read else y

    for read in (True, False):
        graph = torch.fx.symbolic_trace(Uncertain(), {"read": read}).graph
        written = next(node for node in graph.nodes if node.target == "exp_")
        changed = Memory(graph.nodes, lambda node: None).changed_by(written)
        assert (changed is None) == read


def test_an_unknown_module_that_writes_what_is_read_later_is_refused() -> None:
    def shared(net: Any, x: Tensor) -> Tensor:
        y = net.doubling(x)
        return y + x.sin()

    _, model, batches = prepared(shared)
    twin = Twin(Backend(convert_fx(model)))
    with pytest.raises(cptv_ao.UnsupportedModelError, match=r"doubling: .*writes into its input, which is read later"):
        call(twin, as_batch(batches[0]))


def true_loss(model: nn.Module, net: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float(exact_kl(model(b.clone()), net(b.clone()))) for b in batches[:3]) / 3


@pytest.mark.filterwarnings("ignore:refine without float_model")
@pytest.mark.parametrize("form", ["lowered", "lowered alone", "reference", "simulation"])
def test_the_losses_that_are_told_are_the_true_ones(form: str) -> None:
    net, model, batches = prepared(normalised)
    converted = convert_to_reference_fx(model) if form == "reference" else convert_fx(model)
    changes: dict[str, Any] = {"score_on": "simulation"} if form == "simulation" else {}
    float_model = None if form == "lowered alone" else net
    before = true_loss(converted, net, batches)
    given = [batch.clone() for batch in batches]
    cptv_ao.refine(
        converted, batches, float_model=float_model, config=small_config(**SETTINGS, **changes), progress=False
    )
    report = cptv_ao.report(converted)
    assert all(map(torch.equal, batches, given))
    if form.startswith("lowered") and float_model is not None:
        assert report.before.search == pytest.approx(before, rel=1e-4)
        assert report.after.search == pytest.approx(true_loss(converted, net, batches), rel=1e-4)
    if float_model is not None:
        assert true_loss(converted, net, batches) < before


def test_nothing_else_changes_a_batch() -> None:
    net, model, batches = prepared(normalised)
    converted, before = convert_fx(model), 0.0
    before = true_loss(converted, net, batches + batches[:1])
    found = cptv_ao.diagnose(converted, batches[:3], float_model=net, progress=False)
    assert found.loss == pytest.approx(before, rel=1e-4)
    site = next(s.name for s in cptv_ao.find_sites(converted).values() if s.op == "quantize_per_tensor")
    once = count_codes(converted, site, batches[:1])
    twice = count_codes(converted, site, [batches[0], batches[0]])
    assert [2 * count for count in once.counts] == list(twice.counts)


@pytest.mark.parametrize("front", some(*FRONTS[::2], assigned, others=FRONTS), ids=lambda front: front.__name__)
def test_the_twin_of_an_exported_graph(front: Callable[[Any, Tensor], Tensor]) -> None:
    net = nets.seeded(lambda: Writing(front))
    batches = [2 * batch for batch in nets.images(48, 16).split(12)]
    graph = pt2e.exported(copy.deepcopy(net), (batches[0].clone(),))
    model = pt2e.torchao().prepare_pt2e(graph, pt2e.x86())
    for batch in batches:
        model(batch.clone())
    converted = pt2e.torchao().convert_pt2e(model)
    assert disagreement(converted, Twin(Backend(converted)), [as_batch(batches[0])]) < 1e-3
    if front is assigned:
        cptv_ao.refine(converted, batches, float_model=net, config=small_config(**SETTINGS), progress=False)
        told = cptv_ao.report(converted).after.search
        assert told == pytest.approx(true_loss(converted, net, batches), rel=1e-4)


class Buffered(nn.Module):
    """Returns the same tensor each time, with other numbers in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.held = inner, torch.zeros(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.held.copy_(self.inner(x))


def test_a_teacher_that_writes_into_its_last_output() -> None:
    net, _, batches = prepared(module)
    wanted = [call(net, as_batch(batch)) for batch in batches]
    found = teacher_outputs(Buffered(net), [as_batch(batch) for batch in batches])
    assert all(map(torch.equal, found, wanted))
