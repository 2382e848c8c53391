"""Every scale of a converted model is found, described and printed; what must not move does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.scale_slots import infer_range
from cptv_ao.simulation.twin import Twin

CONV_TABLE = """\
site                 kind        op                   shape        codes   zero_point  moves
--------------------------------------------------------------------------------------------
conv1.input_scale_0  activation  quantize_per_tensor  per tensor   0..255  moves       alone
conv1.weight         weight      ConvReLU2d           8 channels   -4..3   fixed       alone
conv1.output         activation  ConvReLU2d           per tensor   0..255  moves       alone
left.weight          weight      Conv2d               4 channels   -4..3   fixed       alone
left.output          activation  Conv2d               per tensor   0..255  moves       alone
right.weight         weight      Conv2d               4 channels   -4..3   fixed       alone
right.output         activation  Conv2d               per tensor   0..255  moves       with left.output
bn2.output           activation  BatchNorm2d          per tensor   0..255  moves       alone
swish.output         activation  Hardswish            per tensor   0..255  moves       alone
gate.weight          weight      Conv2d               8 channels   -4..3   fixed       alone
gate.output          activation  Conv2d               per tensor   0..255  moves       alone
scale_1              activation  quantized.mul        per tensor   0..255  moves       alone
scale_3              activation  quantized.mul        per tensor   0..255  moves       alone
last.weight          weight      Conv2d               8 channels   -4..3   fixed       alone
last.output          activation  Conv2d               per tensor   0..255  moves       alone
scale_4              activation  quantized.add        per tensor   0..255  moves       alone
scale_5              activation  quantized.add        per tensor   0..255  moves       alone
scale_6              activation  quantize_per_tensor  per tensor   0..255  moves       alone
fc1.weight           weight      LinearReLU           12 channels  -4..3   fixed       alone
fc1.output           activation  LinearReLU           per tensor   0..255  moves       alone
fc2.weight           weight      Linear               5 channels   -4..3   fixed       alone
fc2.output           activation  Linear               per tensor   0..255  moves       alone
22 sites, 64 scales, 21 groups that can move"""


class FixedNet(nn.Module):
    """Ops whose output scale never moves, and one whose scale no state_dict keeps (ELU)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.ops = nn.ModuleList([nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Softmax(-1), nn.ELU(), nn.LeakyReLU()])
        self.group_norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.ops:
            x = self.b(op(self.a(x)))
        x = self.b(torch.tanh(self.a(x)).softmax(-1))
        x = nn.functional.hardsigmoid(self.group_norm(self.a(x)))
        return self.b(nn.functional.hardswish(nn.functional.elu(self.a(x))))


def test_every_home_of_a_scale_is_found(conv: Case, functional: Case) -> None:
    assert cptv_ao.find_sites(conv.converted).counts() == {
        "quantize_per_tensor activation": 2,
        "ConvReLU2d weight": 1,
        "ConvReLU2d activation": 1,
        "Conv2d weight": 4,
        "Conv2d activation": 4,
        "BatchNorm2d activation": 1,
        "Hardswish activation": 1,
        "quantized.mul activation": 2,
        "quantized.add activation": 2,
        "LinearReLU weight": 1,
        "LinearReLU activation": 1,
        "Linear weight": 1,
        "Linear activation": 1,
    }
    assert cptv_ao.find_sites(functional.converted).counts() == {
        "quantize_per_tensor activation": 2,
        "quantized.conv2d_relu weight": 1,
        "quantized.conv2d_relu activation": 1,
        "quantized.linear weight": 1,
        "quantized.linear activation": 1,
        "quantized.layer_norm activation": 1,
        "Linear weight": 2,
        "Linear activation": 2,
        "quantized.add activation": 1,
        "quantized.mul activation": 1,
    }


def test_no_op_is_unknown_and_every_quantized_tensor_has_a_site(case: Case) -> None:
    """An oracle that knows nothing of sites: the quantized values that really flow, by their qparams."""
    sites = cptv_ao.find_sites(case.converted)
    assert sites.unknown == ()
    seen = _Values(case.converted)
    seen.run(case.batches[0])
    described = {node for site in sites.values() if site.kind == "activation" for node in site.nodes}
    new = {name for name, (own, inputs) in seen.qparams.items() if own not in inputs}
    fixed = {n.name for n in case.converted.graph.nodes if "sigmoid" in str(n.target)}
    scaled = {n.name for n in case.converted.graph.nodes if "mul" in str(n.target) and 0.5 in n.args}
    assert new - fixed - scaled <= described
    assert described <= set(seen.qparams)


def test_sites_are_described_in_full(conv: Case) -> None:
    sites = cptv_ao.find_sites(conv.converted)
    weight, add = sites["left.weight"], sites["scale_4"]
    assert (weight.kind, weight.shape, weight.axis, weight.scope, weight.affine) == ("weight", (4,), 0, "left", False)
    assert (weight.numel, add.numel) == (4, 1)
    assert (add.kind, add.op, add.shape, add.axis, add.affine) == ("activation", "quantized.add", (), None, True)
    assert (add.qmin, add.qmax) == (0, 255)
    assert all(set(site.nodes) <= {n.name for n in conv.converted.graph.nodes} for site in sites.values())


def test_inputs_of_a_cat_move_together(conv: Case) -> None:
    sites = cptv_ao.find_sites(conv.converted)
    assert sites["left.output"].tied == sites["right.output"].tied == "left.output"
    assert [site.name for site in sites.groups()["left.output"]] == ["left.output", "right.output"]
    assert "right.output" not in sites.groups()
    assert [name for name, site in sites.items() if site.tied != name] == ["right.output"]


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.MaxPool2d(1),
        nn.AvgPool2d(1),
        nn.AdaptiveAvgPool2d(4),
        nn.ReLU6(),
        nn.Dropout(),
        lambda x: x.contiguous(),
        lambda x: nn.functional.avg_pool2d(x, 1),
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x.permute(0, 1, 3, 2),
    ],
)
def test_a_cat_ties_through_ops_that_keep_the_scale(between: Any) -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.between = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), between

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.between(self.a(x)), self.b(x)], 1)

    _, model = nets.quantize(nets.seeded(Cat), [nets.images(4, 3, 4, 4)])
    model.b.scale, model.b.zero_point = model.a.scale, model.a.zero_point
    assert cptv_ao.find_sites(model)["b.output"].tied == "a.output"


def test_inputs_of_a_cat_with_scales_of_their_own_move_alone(conv: Case) -> None:
    conv.converted.right.scale *= 1.5
    assert cptv_ao.find_sites(conv.converted)["right.output"].tied == "right.output"


def test_fixed_qparams_never_move() -> None:
    _, model = nets.quantize(nets.seeded(FixedNet), [nets.images(8, 6)])
    sites = cptv_ao.find_sites(model)
    assert sites.unknown == ()
    fixed = {name: site.fixed for name, site in sites.items() if site.fixed}
    assert fixed["ops.3.output"] == "fixed qparams of softmax"
    by_function = {why for name, why in fixed.items() if "scale" in name}
    assert by_function == {"fixed qparams of softmax", "fixed qparams of hardsigmoid"}
    assert not any(site.affine for site in sites.values() if site.fixed)
    assert not {"ops.0.output", "ops.1.output", "ops.2.output"} & set(sites), "sigmoid and tanh have no free scale"
    assert set(fixed).isdisjoint(sites.groups())
    assert "ops.5.output" in sites.groups()


def test_a_scale_that_no_state_dict_keeps_is_fixed() -> None:
    _, model = nets.quantize(nets.seeded(FixedNet), [nets.images(8, 6)])
    assert "ops.4.scale" not in model.state_dict()
    assert "state_dict" in cptv_ao.find_sites(model)["ops.4.output"].fixed


def test_dynamic_quantization_is_listed_and_fixed() -> None:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig

    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    _, model = nets.quantize(nets.seeded(lambda: nn.Sequential(nn.Linear(6, 6))), [nets.images(8, 6)], mapping=mapping)
    sites = cptv_ao.find_sites(model)
    assert [site.fixed for site in sites.values()] == ["dynamic quantization computes its scales at run time"]


def test_a_dynamic_module_without_a_readable_weight_is_named() -> None:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0])

    mapping = QConfigMapping().set_global(default_dynamic_qconfig)
    _, model = nets.quantize(nets.seeded(Recurrent), [nets.images(8, 6)], mapping=mapping)
    sites = cptv_ao.find_sites(model)
    assert (sites.unknown, sites.weight_only) == ((), ("lstm (LSTM)",))
    assert str(sites).endswith("weights only, left alone: lstm (LSTM)")


def test_the_table_is_readable(conv: Case) -> None:
    sites = cptv_ao.find_sites(conv.converted)
    assert str(sites) == CONV_TABLE
    assert repr(sites) == "<SiteTable of 22 sites; print() it for the table>"


def test_an_op_that_is_not_understood_is_named(conv: Case) -> None:
    graph = conv.converted.graph
    add = next(n for n in graph.nodes if "add" in n.name)
    with graph.inserting_after(add):
        graph.call_function(torch.ops.quantized.celu, (add, 0.1, 3))
    conv.converted.recompile()
    sites = cptv_ao.find_sites(conv.converted)
    assert sites.unknown == ("celu (quantized.celu)",)
    assert str(sites).endswith("not understood, left alone: celu (quantized.celu)")


def test_what_is_quantized_inside_a_module_is_named() -> None:
    """A standalone module is one node of the graph, and so is a module that is not traced."""
    inner = QConfigMapping().set_global(nets.qconfig())
    images = nets.images(4, 6)
    custom = PrepareCustomConfig().set_standalone_module_name("1", inner, (images,), PrepareCustomConfig(), None)
    model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())))
    prepared = prepare_fx(model, nets.mapping(), (images,), custom)
    prepared(images)
    converted = convert_fx(prepared)
    assert cptv_ao.find_sites(converted).unknown == ("1.quantize_per_tensor (quantize_per_tensor)", "1.0 (LinearReLU)")

    class Untraced(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.list = nn.ModuleList([inside])

        def forward(self, x: Tensor) -> Tensor:
            return self.list[0](x)

    setattr(converted, "1", Untraced(getattr(converted, "1")))
    first, second = cptv_ao.find_sites(converted).unknown
    assert (first, second) == ("1.list.0.quantize_per_tensor (quantize_per_tensor)", "1.list.0.0 (LinearReLU)")


def test_a_type_that_is_not_known_is_not_taken_for_another(conv: Case) -> None:
    class LinearReLUAndMore(nnq.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.quantize_per_tensor(super().forward(x).dequantize().cos(), 0.01, 0, torch.quint8)

    class SameLinear(nnq.Linear):
        """Of another name, and nothing else."""

    conv.converted.fc2.__class__ = LinearReLUAndMore
    sites = cptv_ao.find_sites(conv.converted)
    assert sites.unknown == ("fc2 (LinearReLUAndMore)",)
    assert not {"fc2.weight", "fc2.output"} & set(sites)
    images = conv.batches[0]
    with torch.no_grad():
        wanted, got = conv.converted(images), Twin(Backend(conv.converted))(images)
    assert torch.equal(got, wanted), "its own kernel computes it"
    conv.converted.fc2.__class__ = SameLinear
    assert {"fc2.weight", "fc2.output"} <= set(cptv_ao.find_sites(conv.converted))


def test_a_functional_dropout_has_no_scale() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))

    _, model = nets.quantize(nets.seeded(Net), [nets.images(8, 6)])
    assert torch.ops.quantized.dropout in {node.target for node in model.graph.nodes}
    sites = cptv_ao.find_sites(model)
    assert (sites.unknown, [s for s in sites if "scale" in s]) == ((), ["a.input_scale_0"])


def test_the_nominal_range_is_inferred_from_the_codes() -> None:
    def weight(*codes: int) -> Tensor:
        return torch._make_per_tensor_quantized_tensor(torch.tensor(codes, dtype=torch.int8), 0.1, 0)

    assert infer_range(weight(-4, 4)) == (-4, 3), "convert_fx rounds the largest weight to +4 at 3 bits"
    assert infer_range(weight(-2, 1)) == infer_range(weight(0, 2)) == (-2, 1)
    assert infer_range(weight(-8, 7)) == (-8, 7)
    assert infer_range(weight(5)) == (-8, 7)
    assert infer_range(weight(-127, 127)) == (-128, 127)
    assert infer_range(weight(0, 0)) == (-128, 127)


class _Values(torch.fx.Interpreter):
    """Records (scale, zero_point) of every quantized value and of the quantized inputs of its node."""

    def __init__(self, model: torch.fx.GraphModule) -> None:
        super().__init__(model)
        self.qparams: dict[str, tuple[tuple[float, int], list[tuple[float, int]]]] = {}

    def run_node(self, n: torch.fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_quantized:
            inputs = [self.env[i] for i in n.all_input_nodes]
            quantized = [(i.q_scale(), i.q_zero_point()) for i in inputs if isinstance(i, Tensor) and i.is_quantized]
            self.qparams[n.name] = (result.q_scale(), result.q_zero_point()), quantized
        return result
