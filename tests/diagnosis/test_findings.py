"""What `diagnose` reads from the graph, and what it does where the float twin is of no help."""

from __future__ import annotations

import json

import pytest
import torch
import workloads
from helpers import nets
from helpers.cases import Case
from helpers.diagnosed import block, diagnosed, rescale, site
from helpers.quick import some
from helpers.search import exact_kl
from helpers.state import everything
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.backends.float_weights import attach_float_weights
from cptv_ao.fx.node_runner import Recorder
from cptv_ao.simulation import kernel_agreement


def test_unfused_batch_norms_are_counted() -> None:
    pytest.importorskip("timm")
    model = workloads.fashion_cnn().eval()
    images = nets.images(4, 1, 28, 28)
    mapping = cptv_ao.qconfig_mapping(engine="x86")
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    _, stock = nets.quantize(model, [images], mapping=mapping)
    found = cptv_ao.diagnose(stock, [images], float_model=model, progress=False)
    assert len(found.findings.unfused_norms) == norms == 15
    assert "0.bn" in found.findings.unfused_norms
    assert found.advice[0].startswith("15 batch norms are not fused")
    ready = cptv_ao.recipe(model, (images,), qconfig_mapping=mapping)
    _, fused = nets.quantize(ready.model, [images], mapping=ready.qconfig_mapping)
    found = cptv_ao.diagnose(fused, [images], float_model=ready.model, progress=False)
    assert found.findings.unfused_norms == ()


def test_a_batch_norm_behind_something_else_cannot_be_fused(conv: Case) -> None:
    assert any(type(m).__name__ == "BatchNorm2d" for m in conv.converted.modules())
    assert diagnosed(conv).findings.unfused_norms == ()


def test_layers_and_ops_in_float(vit: nn.Module, digits: workloads.Images) -> None:
    batches = list(digits.calibration(16, seed=0).split(8))
    mapping = cptv_ao.qconfig_mapping(engine="x86")
    mapping.set_module_name("blocks.1.mlp.fc1", None)
    _, converted = nets.quantize(vit, batches, mapping=mapping)
    found = cptv_ao.diagnose(converted, batches, float_model=vit, progress=False)
    assert found.findings.float_layers == ("blocks.1.mlp.fc1",)
    assert found.findings.float_ops == {"scaled_dot_product_attention": 4, "GELU": 4}
    assert any("1 layer is computing in float (blocks.1.mlp.fc1)" in sentence for sentence in found.advice)


@pytest.mark.slow
def test_weights_with_too_many_levels(conv: Case) -> None:
    wide = diagnosed(conv).findings.wide_weights
    assert "fc1.weight (-4..4 for -4..3)" in wide
    backend = Backend(conv.converted)
    attach_float_weights(backend, conv.float_model)
    for name, found in backend.sites.items():
        if found.kind == "weight":
            backend.write(name, backend.read(name))  # which clamps
    assert diagnosed(conv).findings.wide_weights == ()


@pytest.mark.parametrize("reduced", some(False, others=[True]))
def test_risk_of_saturation(vit: nn.Module, digits: workloads.Images, reduced: bool) -> None:
    """Told on any machine: 8-bit weights behind activations that use the upper half of their codes."""
    batches = [digits.calibration(16, seed=0)]
    weight = nets.qconfig(8).weight
    activation = MinMaxObserver.with_args(reduce_range=reduced)
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    _, converted = nets.quantize(vit, batches, mapping=mapping)
    findings = cptv_ao.diagnose(converted, batches, float_model=vit, progress=False).findings
    if reduced:
        assert findings.saturation_risk == ()
    else:
        assert "blocks.0.norm1.scale_0" in findings.saturation_risk
        assert "blocks.0.attn.qkv.output" not in findings.saturation_risk, "no kernel multiplies it with a weight"


@pytest.mark.slow
def test_narrow_weights_cannot_saturate(conv: Case) -> None:
    for name, found in Backend(conv.converted).sites.items():
        if found.kind == "activation" and not found.fixed:
            rescale(conv, name, 0.5)
    assert diagnosed(conv).findings.saturation_risk == ()


def test_saturation_here_is_told(conv: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_agreement, "disagreement", lambda *_: 0.27)
    monkeypatch.setattr(kernel_agreement, "saturating_inputs", lambda *_: dict.fromkeys("ba", 200))
    found = diagnosed(conv)
    assert found.findings.saturating == ("a", "b")
    assert found.advice[0].startswith("kernels of this CPU saturate at a, b: ")


def test_a_loader_of_single_images_is_used_whole() -> None:
    model = nets.seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
    images = nets.images(24, 3, 8, 8)
    _, converted = nets.quantize(model, [images])
    by_one = cptv_ao.diagnose(converted, list(images.split(1)), float_model=model, progress=False)
    together = cptv_ao.diagnose(converted, [images], float_model=model, progress=False)
    assert by_one.images == together.images == 24
    assert by_one.loss == pytest.approx(together.loss, rel=1e-3)
    many = cptv_ao.diagnose(converted, [*nets.images(130, 3, 8, 8).split(1)], float_model=model, progress=False)
    assert many.images == 128


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_outputs_that_are_off_are_something_to_gain(spread: float) -> None:
    """However small the loss is: the logits may be small."""
    model = nets.seeded(lambda: nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)))
    with torch.no_grad():
        model[2].weight.mul_(spread)
        model[2].bias.mul_(spread)
    images = nets.images(64, 12)
    _, converted = nets.quantize(model, [images], weight_bits=5)
    found = cptv_ao.diagnose(converted, [images], float_model=model, progress=False)
    assert found.sqnr is not None and 15 < found.sqnr < 35
    assert "run refine" in found.advice[0] and not any("little to gain" in sentence for sentence in found.advice)


# where the twin is of no help


class Odd(nn.Module):
    """Blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OddBlock() for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.blocks:
            x = part(x)
        return self.head(x)


class OddBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(functional.relu(self.a(x)))


@pytest.fixture
def odd() -> Case:
    model = nets.seeded(Odd)
    batches = list(nets.images(64, 12).split(16))
    prepared, converted = nets.quantize(model, batches)
    return Case(model, prepared, nets.without_twin(converted), batches)


def test_by_substitution(odd: Case) -> None:
    given = everything(odd.converted), everything(odd.float_model)
    found = diagnosed(odd)
    assert (everything(odd.converted), everything(odd.float_model)) == given
    assert found.simulated is None and found.floor is None
    assert (
        "forward hooks change what the model returns" in found.notes[0] and "in place of the kernels'" in found.notes[0]
    )
    assert not any(s.sqnr is not None for s in found.sites if s.kind == "activation")
    assert site(found, "blocks.0.a.output").used > 0.3
    assert site(found, "blocks.0.a.weight").sqnr > 10
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert "shares below" not in str(found)

    order = ["blocks.0", "blocks.1", "blocks.2"]
    losses = [found.loss] + [block(found, name).loss_without for name in order]
    for name, before, after in zip(order, losses, losses[1:], strict=False):
        assert block(found, name).share == pytest.approx((before - after) / found.loss, rel=1e-6)
    # the last block's output, put on its scale, is what the head is given
    last = Recorder(odd.converted)
    scores = []
    with torch.no_grad():
        for batch in odd.batches:
            last.run(batch)
            like = last.values[block(found, "blocks.2").node]
            hidden = batch
            for part in odd.float_model.blocks:  # type: ignore[union-attr]
                hidden = part(hidden)
            given_codes = torch.quantize_per_tensor(hidden, like.q_scale(), like.q_zero_point(), torch.quint8)
            scores.append(float(exact_kl(odd.converted.head(given_codes).dequantize(), odd.float_model(batch))))
    assert losses[3] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


@pytest.mark.parametrize("name", ["blocks.0.b.output", "blocks.1.b.output", "blocks.2.a.output"])
def test_substitution_finds_the_block(odd: Case, name: str) -> None:
    assert diagnosed(odd).blocks[0].share < 0.5
    rescale(odd, name, 32)
    assert diagnosed(odd).blocks[0].name == name[: len("blocks.0")]
