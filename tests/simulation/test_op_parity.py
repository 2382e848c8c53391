"""Every op that torch quantizes, with all its settings: the float twin has the kernels' codes, or says that it does not
know the op. Nothing between."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.qat as nnqat
import torch.ao.nn.quantized as nnq
from helpers import nets
from helpers.op_nets import BACKENDS, ENGINES, FLAT, KNOWN, PLANE, Residual, quantized
from tools import op_table
from torch import Tensor, nn
from torch.ao.quantization.backend_config import (
    get_native_backend_config,
)
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.core.batches import Batch
from cptv_ao.core.losses import get_loss
from cptv_ao.core.qparams import QParams
from cptv_ao.evaluation.evaluator import Evaluator
from cptv_ao.simulation.twin import Twin

# Share of the codes that may be off by one: what falls between two codes falls to either side.
FEW = 0.02
# Kernels of QNNPACK that read what nobody wrote (torch 2.14).
OTHER_EACH_TIME = {"ConvTranspose3d", "conv_transpose3d"}


def check(model: GraphModule, images: Tensor) -> None:
    """Kernels and twin have the same codes: the real numbers of the output lie on its scale."""
    backend = Backend(model)
    with torch.no_grad():
        wanted, got = model(images.clone()), Twin(backend).checked(Batch((images,), {}, len(images)))(images)
    assert got.shape == wanted.shape
    steps = wanted.unique().diff()
    step = float(steps[steps > 1e-6].min()) if len(steps) else 1.0
    off = (got - wanted).abs() / step
    assert float(off.max()) < 1.01
    assert float((off > 0.01).float().mean()) <= FEW


def _in_turn() -> list[Any]:
    """Each op on each engine; quick is each on the first of them, and every third on one of the others."""
    first, *others = ENGINES
    quick = {(name, others[number % len(others)]) for number, name in enumerate([*KNOWN][::3]) if others}
    return [
        pytest.param(name, engine, marks=() if engine == first or (name, engine) in quick else pytest.mark.slow)
        for engine in ENGINES
        for name in KNOWN
    ]


@pytest.mark.parametrize(("name", "engine"), _in_turn())
def test_the_twin_has_the_kernels_codes(name: str, engine: str) -> None:
    try:
        model, images = quantized(*KNOWN[name], engine)
        model(images.clone())
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        pytest.skip(f"torch cannot do it on {engine}: {error}")
    if engine == "qnnpack" and name in OTHER_EACH_TIME:
        pytest.skip("the kernel gives other numbers each time")
    check(model, images)


@pytest.mark.parametrize("name", ["conv_transpose1d", "conv_transpose2d", "conv1d", "conv2d"])
def test_a_functional_convolution_is_packed_again_as_what_it_is(name: str) -> None:
    model, images = quantized(*KNOWN[name], "x86")
    backend, before = Backend(model), model(images)
    weight = next(site for site in backend.sites.values() if site.kind == "weight")
    backend.weights.set_float(weight.name, backend.weight(weight.name).dequantize())
    given = backend.read(weight.name)
    backend.write(weight.name, given)
    assert torch.equal(model(images), before)
    backend.write(weight.name, QParams(given.scale * 0.25, given.zero_point))
    assert model(images).shape == before.shape
    assert not torch.equal(model(images), before)


def test_a_quantized_relu6_is_no_identity() -> None:
    """FX leaves nn.ReLU6 as it is; a graph may hold torch's quantized one all the same."""
    model, images = quantized(lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Identity()), FLAT, "x86")
    setattr(model, "2", nnq.ReLU6())
    layer = next(node for node in model.graph.nodes if node.target == "1")
    with model.graph.inserting_after(layer):
        clamp = model.graph.call_module("2", (layer,))
    layer.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)
    model.recompile()
    assert float(model(images).min()) == 0
    check(model, images)


@pytest.mark.skipif("onednn" not in ENGINES, reason="needs the onednn engine")
def test_what_a_kernel_overwrites_is_told() -> None:
    """oneDNN's fused add writes its output over what it adds: the twin computes what was meant, and says so."""
    model, images = quantized(lambda: Residual(True, other=False), PLANE, "onednn")
    twin = Twin(Backend(model)).checked(Batch((images,), {}, len(images)))
    (note,) = twin.notes
    assert "ConvAddReLU2d writes over what it adds, which is read elsewhere too" in note


@pytest.mark.skipif("onednn" not in ENGINES, reason="needs the onednn engine")
def test_what_a_kernel_overwrites_is_not_cached() -> None:
    """An evaluator that begins at the fused add gives it a copy of what is added."""
    model, images = quantized(lambda: Residual(True), PLANE, "onednn")
    backend, batch = Backend(model), Batch((images,), {}, len(images))
    target = torch.zeros(len(images), model(images).flatten(1).shape[1])
    evaluator = Evaluator(model, [batch], [target], get_loss("mse", 1.0))
    whole = evaluator.score()
    given = backend.read("right.output")
    evaluator.enter(backend.sites["right.output"].nodes)
    for _ in range(2):
        backend.write("right.output", QParams(given.scale * 3, given.zero_point))
        assert evaluator.score() != whole
        backend.write("right.output", given)
        assert evaluator.score() == whole


@pytest.mark.skipif("onednn" not in ENGINES, reason="needs the onednn engine")
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("Linear LeakyReLU 0.5", nniq.LinearLeakyReLU),
        ("Linear Tanh", nniq.LinearTanh),
        ("Conv2d + Conv2d", nniq.ConvAdd2d),
        ("Conv2d + Conv2d ReLU", nniq.ConvAddReLU2d),
    ],
)
def test_onednn_fuses_what_is_tested_here(name: str, fused: type[nn.Module]) -> None:
    model, _ = quantized(*KNOWN[name], "onednn")
    assert any(type(module) is fused for module in model.modules())


# Patterns of torch's backend configs that no net here has: recurrent and embedding layers (in backends/test_sites.py),
# what only FX itself makes of a model (fused float modules, those of QAT), and methods of no tensor.
_LOOKED_UP = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.Embedding, nn.EmbeddingBag}
_MADE = {kind for package in (nni, nniqat, nnqat) for kind in vars(package).values() if isinstance(kind, type)}
_APART = _LOOKED_UP | _MADE | {"hardsigmoid", "hardsigmoid_", "shape", operator.floordiv}


def _leaves(pattern: Any) -> Iterator[Any]:
    for part in pattern if isinstance(pattern, tuple) else (pattern,):
        yield from _leaves(part) if isinstance(part, tuple) else (part,)


@pytest.mark.slow
def test_every_op_that_torch_quantizes_is_tested_here() -> None:
    """A new one in torch's own lists shows up."""
    made = [make for make, _ in KNOWN.values()]
    seen: set[Any] = set()
    for make in made:
        model = nets.seeded(make, random_norms=False)
        seen |= {type(module) for module in model.modules()}
        seen |= {node.target for node in torch.fx.symbolic_trace(model).graph.nodes}
    wanted = {
        leaf
        for config in (get_native_backend_config(), *(BACKENDS[engine]() for engine in ENGINES))
        for one in config.configs
        for leaf in _leaves(one.pattern or ())
    }
    assert sorted(map(str, wanted - seen - _APART)) == []


@pytest.mark.slow
def test_the_page_of_ops_is_true() -> None:
    """Written by `python tests/tools/op_table.py`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = op_table.table()
    assert found == op_table.PAGE.read_text()
    assert op_table.NOT not in found.replace(op_table.HEAD, "")
