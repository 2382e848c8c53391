"""Constants of PT2E graphs: parameters, buffers and numbers that ops other than layers read, on scales of their own.

`Constants` annotates what ExecuTorch's XNNPACKQuantizer does, the tensors that sums, products and joins read, and more.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets, pt2e
from helpers.quick import each_pair, each_value
from helpers.search import small_config
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.diagnosis.code_counts import count_codes
from cptv_ao.simulation.twin import Twin

torchao = pt2e.torchao()
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e import quantizer as specs

_aten = torch.ops.aten
BATCHES = list(nets.images(64, 12).split(16))


class Constants(specs.Quantizer):
    """Puts what sums, products, joins and layers read on scales; constants per channel of their last dimension, or as
    activations are.

    Args:
        dtype: of activations, and of constants that are as they are.
    """

    def __init__(self, dtype: torch.dtype = torch.int8, per_channel: bool = False) -> None:
        super().__init__()
        signed = dtype == torch.int8
        ends = {"quant_min": -128, "quant_max": 127} if signed else {"quant_min": 0, "quant_max": 255}
        self._value = specs.QuantizationSpec(dtype, MinMaxObserver, **ends, qscheme=torch.per_tensor_affine)
        self._per_channel = per_channel

    def _channels(self, axis: int) -> Any:
        return specs.QuantizationSpec(
            torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=axis
        )

    def _spec(self, node: Node, source: Node) -> Any:
        if node.target is _aten.linear.default and source is node.args[1]:
            return self._channels(0)
        if self._per_channel and source.op == "get_attr" and source.meta["val"].dim() > 1:  # torchao observes no others
            return self._channels(source.meta["val"].dim() - 1)
        return self._value

    def annotate(self, model: GraphModule) -> GraphModule:
        read = (_aten.add.Tensor, _aten.mul.Tensor, _aten.cat.default, _aten.matmul.default, _aten.linear.default)
        for node in (node for node in model.graph.nodes if node.target in read):
            given = node.args[0] if node.target is _aten.cat.default else node.args[:2]
            inputs = {source: self._spec(node, source) for source in given if isinstance(source, Node)}
            output = self._value
            if node.target is _aten.cat.default and not self._per_channel:  # one scale for all, as kernels want it
                output = specs.SharedQuantizationSpec((given[0], node))
                inputs = {source: inputs[source] if source is given[0] else output for source in inputs}
            node.meta["quantization_annotation"] = specs.QuantizationAnnotation(inputs, output, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)


class Embedded(Net):
    """A position embedding before an add, and a class token before a cat."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token = nn.Parameter(torch.randn(1, 2, 12)), nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)[:, None]], 1)
        return self.b(x + self.position).mean(1)


class Buffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(12))
        self.register_buffer("factor", torch.rand(12) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.shift) * self.factor)


class Scalars(Net):
    """Tensors of one number, one of which is not what the graph reads, and nearer to nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.tensor(50.0))
        self.factor, self.shift = nn.Parameter(torch.tensor(1.7)), nn.Parameter(torch.tensor([-0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.factor + self.shift)


class Shared(Net):
    """One constant that two ops read."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) + self.both).relu() * self.both)


class Moved(Net):
    """Constants behind a permute, a reshape and an expand."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.flat = nn.Parameter(torch.randn(1, 12, 3)), nn.Parameter(torch.randn(36))
        self.row = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)[:, None] + self.turned.permute(0, 2, 1)
        x = x * self.flat.reshape(1, 3, 12)
        return self.b(x + self.row.expand(3, 12)).mean(1)


class Products(Net):
    """Parameters that are multiplied with: from the right, from the left, and as a linear's input."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(12, 12) / 3), nn.Parameter(torch.randn(5, 12) / 3)
        self.queries, self.turned = nn.Parameter(torch.randn(7, 12)), nn.Parameter(torch.randn(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) @ self.right
        keys = torch.matmul(self.left, x.unsqueeze(-1)).squeeze(-1)
        return keys + self.b(self.queries).mean(0) + functional.linear(x, self.turned.t())


class Indexed(Net):
    """A table that is looked up, and a tensor and a number that no module holds; one that it does hold is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 12))
        self.register_buffer("index", torch.tensor([0, 3, 3]))
        self.unused = nn.Parameter(torch.tensor(50.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)[:, None] + self.table[self.index]
        return self.b(x * torch.tensor([0.5, 1.5] * 6) + torch.tensor(0.25)).mean(1)


def expected(net: nn.Module) -> list[Tensor]:
    """The constants that ops of a net read, as they read them."""
    given: Any = net
    if isinstance(net, Embedded):
        return [given.position]
    if isinstance(net, Buffers):
        return [given.shift, given.factor]
    if isinstance(net, Scalars):
        return [given.factor, given.shift]
    if isinstance(net, Shared):
        return [given.both]
    if isinstance(net, Moved):
        return [given.turned.permute(0, 2, 1), given.flat.reshape(1, 3, 12), given.row.expand(3, 12)]
    if isinstance(net, Products):
        return [given.right, given.left, given.queries]
    return [given.table[given.index], torch.tensor([0.5, 1.5] * 6), torch.tensor(0.25)]


NETS = [Embedded, Buffers, Scalars, Shared, Moved, Products]
QUANTIZERS = {
    "int8": Constants, "uint8": lambda: Constants(torch.uint8), "per channel": lambda: Constants(per_channel=True),
    "xnnpack": pt2e.xnnpack,
}  # fmt: skip


def exported(model: nn.Module, dynamic: bool = True) -> GraphModule:
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None
    found = torch.export.export(model, (BATCHES[0],), dynamic_shapes=shapes).module()
    assert isinstance(found, GraphModule)
    return found


def converted(model: nn.Module, quantizer: Any, fold: bool = True, dynamic: bool = True) -> GraphModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = torchao.prepare_pt2e(exported(model, dynamic), quantizer)
        for batch in BATCHES:
            prepared(batch)
        graph: GraphModule = torchao.convert_pt2e(prepared, fold_quantize=fold)
        return graph


def constants(backend: Backend) -> list[str]:
    return [name for name in backend.sites if "constant" in name]


def close(value: Tensor, given: Tensor) -> bool:
    return value.numel() == given.numel() and torch.equal(value.flatten(), given.detach().flatten())


@pytest.mark.parametrize(("net", "quantizer", "fold"), each_pair(NETS, QUANTIZERS, [True, False]))
def test_a_constant_is_a_site_with_the_values_that_it_was_made_of(net: Any, quantizer: str, fold: bool) -> None:
    model = nets.seeded(net)
    graph = converted(model, QUANTIZERS[quantizer](), fold)
    backend = Backend(graph)
    assert attach_float_weights(backend, model) == []
    names, left = constants(backend), expected(model)
    assert names and backend.sites.unknown == ()
    for name in names:
        site = backend.sites[name]
        assert (site.kind, site.fixed) == ("weight", "")
        assert site.op != "linear" or net is Products
        assert name in backend.movable()
        assert any(close(backend.float_weights[name], given) for given in left), name
    if quantizer != "xnnpack":
        found = [backend.float_weights[name] for name in names]
        assert all(any(close(value, given) for value in found) for given in left)


@pytest.mark.parametrize(("net", "quantizer", "fold"), each_value(NETS, QUANTIZERS, [False, True]))
def test_a_written_constant_is_in_graph_and_twin_alike_and_undone(net: Any, quantizer: str, fold: bool) -> None:
    model = nets.seeded(net)
    graph = converted(model, QUANTIZERS[quantizer](), fold)
    backend = Backend(graph)
    attach_float_weights(backend, model)
    before = backend.snapshot()
    with torch.no_grad():
        given = graph(BATCHES[0])
        assert torch.equal(Twin(backend)(BATCHES[0]), given)
        for name in constants(backend):
            now = backend.read(name)
            backend.write(name, cptv_ao.QParams(now.scale * 100, now.zero_point))
            off = (backend.weight(name).dequantize().flatten() - backend.float_weights[name].flatten()).abs()
            assert float(off.max()) <= 50.1 * float(now.scale.max()), name
            assert not torch.equal(graph(BATCHES[0]), given), name
            assert torch.equal(Twin(backend)(BATCHES[0]), graph(BATCHES[0])), name
            backend.restore_all(before)
            assert torch.equal(graph(BATCHES[0]), given), name


@pytest.mark.parametrize(
    ("net", "quantizer"),  # but for one number: that has a code of its own
    each_value([net for net in NETS if net is not Scalars], ["int8", "uint8", "per channel"]),
)
def test_constants_are_searched_reported_saved_and_diagnosed(net: Any, quantizer: str, tmp_path: Path) -> None:
    model = nets.seeded(net)
    graph = converted(model, QUANTIZERS[quantizer]())
    again = converted(model, QUANTIZERS[quantizer]())
    backend = Backend(graph)
    attach_float_weights(backend, model)
    for name in constants(backend):  # coarse, so that there is something to find
        now = backend.read(name)
        backend.write(name, cptv_ao.QParams(now.scale * 4, now.zero_point))
    settings = {"evaluations": 20, "gradient_steps": 20, "loss": "mse", "holdout": 0, "population": ()}
    config = small_config(**settings, include=("*constant*",))
    cptv_ao.refine(graph, BATCHES, float_model=model, config=config, progress=False)
    report = cptv_ao.report(graph)
    assert report.after.search < report.before.search
    assert report.moves and {move.kind for move in report.moves} == {"weight"}
    assert all("constant" in move.name for move in report.moves)
    assert not any(note.startswith("constants whose") for note in report.notes)
    cptv_ao.save_scales(graph, tmp_path / "scales")
    cptv_ao.load_scales(again, tmp_path / "scales")
    with torch.no_grad():
        assert torch.equal(again(BATCHES[0]), graph(BATCHES[0]))
    name = report.moves[0].name
    assert count_codes(graph, name).total == Backend(graph).weight(name).numel()
    cptv_ao.diagnose(graph, BATCHES, float_model=model, progress=False)


class Joined(Net):
    """A constant before a cat, all of which XNNPACK wants on one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(16, 1, 12) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cat([self.token, self.a(x)[:, None]], 1).relu()).mean(1)


@pytest.mark.parametrize("fold", [True, False])
def test_a_constant_on_the_scale_of_an_activation_moves_with_it(fold: bool) -> None:
    model = nets.seeded(Joined)
    graph = converted(model, Constants(), fold, dynamic=False)
    backend = Backend(graph)
    (name,) = constants(backend)
    site = backend.sites[name]
    lead = backend.sites[site.tied]
    assert site.affine and lead.kind == "activation"
    assert (lead.name in backend.movable()) is not fold, "not without the values that are rounded anew"
    attach_float_weights(backend, model)
    group = backend.movable()[lead.name]
    assert group[0] == lead and site in group and len(group) > 2
    given = {one.name: backend.read(one.name) for one in group}
    config = small_config(
        evaluations=10, gradient_steps=30, loss="mse", holdout=0, population=("ranges",), include=(lead.name,)
    )
    cptv_ao.refine(graph, BATCHES, float_model=model, config=config, progress=False)
    report = cptv_ao.report(graph)
    assert report.after.search < report.before.search
    assert {move.name for move in report.moves} == {one.name for one in group}
    now = [Backend(graph).read(one.name) for one in group]
    assert not torch.equal(now[0].scale, given[lead.name].scale)
    assert all(torch.equal(one.scale, now[0].scale) and torch.equal(one.zero_point, now[0].zero_point) for one in now)
    backend = Backend(graph)
    attach_float_weights(backend, model)
    with torch.no_grad():
        codes, float_weight = backend.weight(name).dequantize(), backend.float_weights[name]
        low, high = ((end - now[0].zero_point) * now[0].scale for end in (site.qmin, site.qmax))
        assert float((codes - float_weight.clamp(low, high)).abs().max()) <= 0.51 * float(now[0].scale)
        backend.write(lead.name, cptv_ao.QParams(now[0].scale * 1.1, now[0].zero_point + 7))
        backend.write(name, cptv_ao.QParams(now[0].scale * 1.1, now[0].zero_point + 7))
        assert torch.equal(Twin(backend)(BATCHES[0]), graph(BATCHES[0]))


def test_what_the_float_model_computes_of_its_constants_is_known_of_the_exported_one() -> None:
    model = nets.seeded(Indexed)
    graph = converted(model, Constants())
    names = constants(Backend(graph))
    backend = Backend(graph)
    unknown = [name for name in names if backend.weight(name).numel() > 1]
    assert len(names) == 3 and len(unknown) == 2 and attach_float_weights(backend, model) == unknown
    assert not set(names) & set(backend.float_weights)
    backend = Backend(graph)
    assert attach_float_weights(backend, exported(model)) == []
    for given in expected(model):
        assert any(close(backend.float_weights[name], given) for name in names)
    config = small_config(evaluations=2, gradient_steps=0, population=(), holdout=0)
    cptv_ao.refine(graph, BATCHES, float_model=model, config=config, progress=False)
    told = [note for note in cptv_ao.report(graph).notes if note.startswith("constants whose values")]
    assert len(told) == 1 and all(name in told[0] for name in unknown)
