"""The float twin against the kernels, its gradients against finite differences, and searching on it."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import workloads
from helpers import nets
from helpers.cases import Case, backend_of
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import get_loss
from cptv_ao.core.qparams import QParams
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.fx.node_runner import Recorder
from cptv_ao.simulation.autograd_ops import Clamp
from cptv_ao.simulation.kernel_agreement import disagreement
from cptv_ao.simulation.qtensor import Limits, from_kernel
from cptv_ao.simulation.quantizers import WeightQuantizer
from cptv_ao.simulation.simulated_backend import SimulatedBackend
from cptv_ao.simulation.twin import Twin, set_rounding, unquantized

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ENGINES = ["x86", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("fbgemm", "qnnpack"))]
EQUAL = 0.9999
# One code of one row that lies on the edge of rounding: all its equals in the row are off together.
FEW = 8


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _differing(simulated: Any, kernel: Any) -> Iterator[tuple[int, int, int]]:
    """(codes that differ, codes, largest difference) of each quantized tensor; float outputs are compared here."""
    if isinstance(kernel, (list, tuple)):
        for a, b in zip(simulated, kernel, strict=True):
            yield from _differing(a, b)
    elif isinstance(kernel, Tensor) and kernel.is_quantized:
        assert float(simulated.scale) == pytest.approx(kernel.q_scale(), rel=1e-6)
        assert float(simulated.zero_point) == kernel.q_zero_point()
        off = (simulated.codes + simulated.zero_point - kernel.int_repr().to(simulated.codes.device)).abs()
        yield int((off > 0).sum()), off.numel(), int(off.max()) if off.numel() else 0
    elif isinstance(kernel, Tensor) and kernel.is_floating_point():
        torch.testing.assert_close(simulated.cpu(), kernel, rtol=1e-5, atol=1e-5)


def _check_parity(
    model: GraphModule, images: Tensor, device: str = "cpu", skip: Callable[[Node], bool] = lambda n: False
) -> int:
    """Give each op of the twin what the kernel was given; returns how many quantized results were compared."""
    recorder = Recorder(model)
    with torch.no_grad():
        recorder.run(images)
    twin = Twin(Backend(model)).to(device).module
    nodes = {node.name: node for node in model.graph.nodes}
    compared = 0

    def given(node: Node) -> Any:
        return tree_map(partial(from_kernel, device=device), recorder.values[node.name])

    for node in twin.graph.nodes:
        if node.op != "call_module" or skip(nodes[node.name]):
            continue
        with torch.no_grad():
            result = twin.get_submodule(str(node.target))(*map_arg(node.args, given), **map_arg(node.kwargs, given))
        for off, count, largest in _differing(result, recorder.values[node.name]):
            where = f"{node.name} ({nodes[node.name].target}): {off} of {count} codes differ"
            assert off <= max((1 - EQUAL) * count, FEW), where
            assert largest <= 1, where
            compared += 1
    return compared


def of_timm(name: str, **settings: Any) -> nn.Module:
    """One of timm's models with random weights."""
    return pytest.importorskip("timm").create_model(name, **settings)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: of_timm("resnet18"), 64),
    "mobilenetv2_100": (lambda: of_timm("mobilenetv2_100"), 64),
    "levit_128s": (lambda: of_timm("levit_128s"), 224),
    "deit_tiny": (lambda: of_timm("deit_tiny_patch16_224", img_size=112), 112),
    "swin_tiny": (lambda: of_timm("swin_tiny_patch4_window7_224", img_size=112), 112),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "engine"),
    [*((name, "x86") for name in MODELS), *((name, "qnnpack") for name in MODELS), ("deit_tiny", "fbgemm")],
)
def test_each_op_computes_the_kernels_codes(name: str, engine: str) -> None:
    make, size = MODELS[name]
    model = nets.seeded(make, random_norms=name in {"resnet18", "mobilenetv2_100"})
    _, converted = nets.quantize(model, [nets.images(2, 3, size, size)], engine=engine)

    def broken(node: Node) -> bool:
        # QNNPACK's clamp scrambles channels-last inputs: it writes them into a contiguous output.
        return engine == "qnnpack" and name == "mobilenetv2_100" and "act" in node.name

    assert _check_parity(converted, nets.images(2, 3, size, size, seed=1), skip=broken) > 50


@pytest.mark.parametrize("engine", ENGINES)
def test_each_op_of_the_trained_vit_computes_the_kernels_codes(
    vit: nn.Module, digits: workloads.Images, engine: str, device: str
) -> None:
    _, converted = workloads.quantize(copy.deepcopy(vit), [digits.calibration(128, 0)], engine=engine)
    assert _check_parity(converted, digits.test[:50], device) > 50


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
def test_each_op_of_the_small_networks_computes_the_kernels_codes(engine: str) -> None:
    for make, size in ((nets.ConvNet, 16), (nets.FunctionalNet, 8)):
        _, converted = nets.quantize(nets.seeded(make), [nets.images(8, 3, size, size)], engine=engine)
        assert _check_parity(converted, nets.images(8, 3, size, size, seed=1)) > 10


@pytest.mark.parametrize("engine", ENGINES)
def test_trained_vit_end_to_end(vit: nn.Module, digits: workloads.Images, engine: str, device: str) -> None:
    _, converted = workloads.quantize(copy.deepcopy(vit), [digits.calibration(256, 0)], engine=engine)
    twin = Twin(Backend(converted)).to(device)
    images = digits.test[:500]
    kernels, simulated = workloads.logits(converted, images), workloads.logits(twin.module, images.to(device)).cpu()
    assert workloads.agreement(simulated, kernels) == 1.0
    assert float((simulated - kernels).norm() / kernels.norm()) < 0.01
    assert disagreement(converted, twin, [Batch((images,), {}, 500)]) < 0.01


SATURATING = """
import torch, workloads
from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.simulation.kernel_agreement import disagreement
from cptv_ao.simulation.twin import Twin
torch.set_num_threads(1)
digits = workloads.digits()
_, model = workloads.quantize(
    workloads.trained("digits_vit"), [digits.calibration(64, 0)], reduce_range=False, engine="onednn"
)
print(disagreement(model, Twin(Backend(model)), [Batch((digits.test[:100],), {}, 100)]))
"""


@pytest.mark.slow
@pytest.mark.skipif("onednn" not in torch.backends.quantized.supported_engines, reason="needs the onednn engine")
@pytest.mark.slow
def test_disagreement_shows_saturation() -> None:
    """Without VNNI oneDNN adds pairs of 8-bit products in 16 bits, which 255 * 127 * 2 does not fit."""
    pytest.importorskip("timm", reason="the trained ViT's blocks are timm's")
    root = Path(__file__).parents[2]
    environment = dict(
        os.environ, ONEDNN_MAX_CPU_ISA="AVX2", PYTHONPATH=os.pathsep.join([str(root), str(root / "examples")])
    )
    command = [sys.executable, "-W", "ignore", "-c", SATURATING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.03


def _double(twin: Twin, batch: Tensor) -> Tensor:
    twin.module.double()
    return batch.double()


def test_gradients_of_the_unrounded_path_are_those_of_finite_differences(small: Case) -> None:
    """Every scale and zero_point of every site, and what is added to biases, weights re-rounded; float64, so that
    differences are exact enough."""
    backend = backend_of(small)
    twin = Twin(backend)
    twin.reround_weights()
    set_rounding(twin, "clamp")
    batch = _double(twin, small.batches[0])
    generator = torch.Generator().manual_seed(0)
    values: dict[str, dict[str, Tensor]] = {}
    for name in twin.names:
        now, affine = twin.sites.get(name), backend.sites[name].affine
        # Without rounding a scale matters where codes are clipped; one factor for all would put sums on the very edge.
        factor = 0.4 + 0.4 * torch.rand((), generator=generator, dtype=torch.float64)
        scale = (now.scale * factor).requires_grad_()
        values[name] = {"scale": scale}
        if affine:
            values[name]["zero_point"] = (now.zero_point.double() + 0.3).requires_grad_()
        if isinstance(weight := twin.sites.modules[name], WeightQuantizer):
            added = 0.1 * torch.randn(len(weight.codes), generator=generator, dtype=torch.float64)
            values[name]["correction"] = added.requires_grad_()
    direction = torch.randn(twin(batch).shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (twin.call(values, batch) * direction).sum()

    leaves = {(name, kind): leaf for name, buffers in values.items() for kind, leaf in buffers.items()}
    gradients = torch.autograd.grad(loss(), list(leaves.values()), allow_unused=True)
    checked = 0
    for ((name, kind), leaf), gradient in zip(leaves.items(), gradients, strict=True):
        along = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        along = along * leaf.detach() if kind == "scale" else along
        expected = _slope(leaf, along, loss)
        got = 0.0 if gradient is None else float((gradient * along).sum())
        assert got == pytest.approx(expected, rel=2e-3, abs=2e-4), (name, kind)
        checked += abs(expected) > 1e-3
    assert checked > len(twin.names) / 3


def _slope(leaf: Tensor, along: Tensor, loss: Callable[[], Tensor], step: float = 1e-6) -> float:
    with torch.no_grad():
        kept = leaf.clone()
        leaf.copy_(kept + step * along)
        above = float(loss())
        leaf.copy_(kept - step * along)
        below = float(loss())
        leaf.copy_(kept)
    return (above - below) / (2 * step)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.6), (-0.4, 0.5), (-0.4, math.inf), (-math.inf, 0.3), (0.2, 0.6)])
def test_gradients_of_a_clamp_are_those_of_finite_differences(low: float, high: float) -> None:
    codes = torch.linspace(-99.97, 99.31, 1001, dtype=torch.float64)
    weights = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limits = Limits.of(torch.tensor(0.0), -128, 127, "clamp")

    def value(scale: Tensor) -> Tensor:
        return (Clamp.apply(codes, scale, low, high, limits) * weights).sum()

    scale = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(Clamp.apply(codes, scale, low, high, limits), (codes * scale).clamp(low, high) / scale)
    (gradient,) = torch.autograd.grad(value(scale), scale)
    step = 1e-7
    expected = (value(scale.detach() + step) - value(scale.detach() - step)) / (2 * step)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_the_gradient_of_a_strided_pointwise_convolution_stays_in_its_memory() -> None:
    """In a process of its own: with channels last oneDNN corrupts the heap."""
    code = """
import torch
from cptv_ao.simulation.products import Convolution
product = Convolution((2, 2), (0, 0), (1, 1), 1)
for _ in range(40):
    codes, weight = torch.randn(4, 3, 128, 128), torch.randn(48, 3, 1, 1)
    out = product.forward(codes.contiguous(memory_format=torch.channels_last), weight)
    product.backward(torch.randn_like(out).contiguous(memory_format=torch.channels_last), codes, weight, (True, True))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_clamp_passes_the_gradient_of_codes_that_it_leaves() -> None:
    codes = torch.tensor([-3.0, 0.0, 1.0, 59.0, 61.0], requires_grad=True)
    Clamp.apply(codes, torch.tensor(0.1), 0.0, 6.0, Limits.of(torch.tensor(0.0), -128, 127, "round")).sum().backward()
    assert codes.grad is not None
    assert codes.grad.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("rounding", ["round", "clamp"])
def test_clipped_codes_give_their_gradient_to_the_zero_point(rounding: Any) -> None:
    """By hand: value 3 at scale 0.5 is code 6, which is clipped to 255 - zero_point = 5 at zero_point 250."""
    _, converted = nets.quantize(nets.seeded(nets.ConvNet), [nets.images(4, 3, 16, 16)])
    backend = Backend(converted)
    name = next(iter(backend.sites))
    twin = Twin(backend)
    set_rounding(twin, rounding)
    quantizer: Any = twin.sites.modules[name]
    scale = torch.tensor(0.5, requires_grad=True)
    zero_point = torch.tensor(250.0, requires_grad=True)
    value = torch.tensor([3.0, -1.3, 0.7, -200.0], requires_grad=True)
    del quantizer.scale, quantizer.zero_point
    quantizer.scale, quantizer.zero_point = scale, zero_point
    codes = quantizer(value).codes
    inner = torch.tensor([-2.6, 1.4])
    expected = torch.cat([torch.tensor([5.0]), inner.round() if rounding == "round" else inner, torch.tensor([-250.0])])
    torch.testing.assert_close(codes.detach(), expected)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (codes * weights).sum().backward()
    assert value.grad is not None and scale.grad is not None and zero_point.grad is not None
    torch.testing.assert_close(value.grad, torch.tensor([0.0, 20.0, 200.0, 0.0]))
    torch.testing.assert_close(scale.grad, torch.tensor(-(10 * -2.6 + 100 * 1.4) / 0.5))
    torch.testing.assert_close(zero_point.grad, torch.tensor(-1001.0))


def test_straight_through_gradients_are_near_those_of_the_unrounded_path(vit_w3: Case, device: str) -> None:
    backend = backend_of(vit_w3)
    twin = Twin(backend).to(device)
    twin.reround_weights()
    found = []
    batch = vit_w3.batches[0].to(device)
    target = vit_w3.float_model(vit_w3.batches[0]).detach().to(device)
    for rounding in ("round", "clamp"):
        set_rounding(twin, rounding)  # type: ignore[arg-type]
        scales = {n: twin.sites.get(n).scale.float().to(device).requires_grad_() for n in twin.names}
        values = {n: {"scale": scale} for n, scale in scales.items()}
        loss = nn.functional.mse_loss(twin.call(values, batch) * 3, target)  # off by a factor: a clear direction
        loss.backward()
        found.append(
            torch.cat([s.grad.flatten() * s.detach().flatten() for s in scales.values() if s.grad is not None])
        )
    assert float(nn.functional.cosine_similarity(found[0], found[1], dim=0)) > 0.5


def test_writing_the_twin_follows_the_model(case: Case, device: str) -> None:
    """Whatever is written to both gives outputs that agree; restoring gives the first ones bit for bit."""
    backend = backend_of(case)
    simulated = SimulatedBackend(backend, device)
    batches = [Batch((b,), {}, len(b)) for b in case.batches[:1]]
    before = simulated.model(case.batches[0].to(device))
    states = simulated.snapshot()
    for lead, group in backend.movable().items():
        now = backend.read(lead)
        for site in group:
            zero_point = now.zero_point + 2 if site.affine else now.zero_point
            simulated.write(site.name, QParams(now.scale * 1.1, zero_point))
            backend.write(site.name, QParams(now.scale * 1.1, zero_point))
            assert torch.equal(simulated.read(site.name).scale, backend.read(site.name).scale)
            assert torch.equal(simulated.read(site.name).zero_point, backend.read(site.name).zero_point)
    assert not torch.equal(simulated.model(case.batches[0].to(device)), before)
    assert disagreement(case.converted, simulated.twin, batches) < 0.02
    simulated.restore_all(states)
    assert torch.equal(simulated.model(case.batches[0].to(device)), before)
    assert disagreement(case.converted, simulated.twin, batches) > 0.02


def test_search_on_the_twin_then_commit(vit_w3: Case, device: str) -> None:
    """An evaluator runs the twin by blocks as it runs the kernels; only `commit` writes into the model."""
    backend = backend_of(vit_w3)
    simulated = SimulatedBackend(backend, device)
    batches = [simulated.batch(Batch((b,), {}, len(b))) for b in vit_w3.batches[:2]]
    teacher = teacher_outputs(copy.deepcopy(vit_w3.float_model).to(device), batches)
    evaluator = Evaluator(simulated.model, batches, teacher, get_loss("kl", 1.0))
    kernels = backend.snapshot()
    whole = evaluator.score()
    for site in list(backend.sites.values())[-30::10]:
        evaluator.enter(site.nodes)
        assert evaluator.score() == whole
        before = simulated.state(site.name)
        simulated.write(site.name, QParams(simulated.read(site.name).scale * 0.5, simulated.read(site.name).zero_point))
        changed = evaluator.score()
        evaluator.leave()
        assert evaluator.score() == changed != whole
        simulated.restore(site.name, before)
    name = next(s.name for s in backend.sites.values() if s.kind == "weight")
    simulated.write(name, QParams(simulated.read(name).scale * 1.1, simulated.read(name).zero_point))
    expected = evaluator.score()
    assert backend.snapshot()[name][0].slot is kernels[name][0].slot
    assert simulated.commit() == [name]
    again = Evaluator(Twin(backend).to(device).module, batches, teacher, get_loss("kl", 1.0))
    assert again.score() == expected


@pytest.mark.parametrize("weights", ["known", "unknown"])
def test_unquantized_twin_is_near_the_float_model(vit: nn.Module, digits: workloads.Images, weights: str) -> None:
    images = digits.test[:100]
    _, converted = workloads.quantize(copy.deepcopy(vit), [digits.calibration(128, 0)])
    backend = Backend(converted)
    if weights == "known":
        attach_float_weights(backend, vit)
    before = {n: backend.weight(n).int_repr() for n, s in backend.sites.items() if s.kind == "weight"}
    teacher = unquantized(backend)
    with torch.no_grad():
        expected, got, quantized = vit(images), teacher(images), converted(images)
    error, error_quantized = ((x - expected).norm() / expected.norm() for x in (got, quantized))
    assert float(error) < (1e-5 if weights == "known" else 0.5 * float(error_quantized))
    for name, codes in before.items():
        assert torch.equal(backend.weight(name).int_repr(), codes)


def test_twin_shares_nothing_but_float_weights_and_only_reads_these(case: Case) -> None:
    twin, weights = Twin(backend_of(case)), list(case.float_model.parameters())
    held = {t.data_ptr() for t in (*case.converted.parameters(), *case.converted.buffers(), *weights)}
    tensors = (*twin.module.named_parameters(), *twin.module.named_buffers())
    assert {name.rpartition(".")[2] for name, t in tensors if t.data_ptr() in held} <= {"weight"}
    assert not any(p.requires_grad for p in twin.module.parameters())
    before, versions = [weight.detach().clone() for weight in weights], [weight._version for weight in weights]
    for name in twin.names:
        now, scale = twin.sites.get(name), twin.sites.modules[name].scale.clone().requires_grad_()
        twin.sites.set(name, QParams(now.scale * 1.1, now.zero_point))
        if isinstance(quantizer := twin.sites.modules[name], WeightQuantizer):
            shift = torch.full_like(quantizer.weight, 0.3, requires_grad=True)
            with twin.sites.replaced({name: {"scale": scale, "shift": shift}}):
                twin.reround_weights()
                quantizer.dequantize().sum().backward()
    with twin.in_float(twin.names), torch.no_grad():
        twin(case.batches[0])
    assert all(map(torch.equal, before, weights)) and versions == [weight._version for weight in weights]
