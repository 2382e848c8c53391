"""Kernels that compute something else than their layers are named, with the way around; no scale is advised."""

from __future__ import annotations

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping

import cptv_ao
from cptv_ao.backends.kernel_faults import scrambling_clamps
from cptv_ao.core.loader import read_batches

BATCHES = list(nets.images(32, 4, 8, 8).split(8))


class Clamped(nn.Module):
    """A convolution and a ReLU6, between them what sets the order in memory."""

    def __init__(self, contiguous: bool, in_place: bool = False) -> None:
        super().__init__()
        self.a, self.clamp, self.b = nn.Conv2d(4, 8, 3), nn.ReLU6(in_place), nn.Conv2d(8, 5, 3)
        self.contiguous = contiguous

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.contiguous() if self.contiguous else x
        return self.b(self.clamp(x)).mean((2, 3))


def apart(model: nn.Module, float_model: nn.Module) -> float:
    """|quantized - float| / |float| on the first batch."""
    with torch.no_grad():
        got, wanted = model(BATCHES[0]), float_model(BATCHES[0])
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("engine", "contiguous", "in_place"),
    [("qnnpack", False, False), ("qnnpack", False, True), ("qnnpack", True, False), ("x86", False, False)],
)
def test_clamps_that_scramble_are_named(engine: str, contiguous: bool, in_place: bool) -> None:
    float_model = nets.seeded(lambda: Clamped(contiguous, in_place))
    _, model = nets.quantize(float_model, BATCHES, engine=engine)
    wrong = apart(model, float_model) > 0.3
    assert wrong == (engine == "qnnpack" and not contiguous), "the way around is one"
    named = scrambling_clamps(model, read_batches(BATCHES)[0])
    assert named == (["clamp"] if wrong else [])
    found = cptv_ao.diagnose(model, BATCHES, float_model=float_model, progress=False)
    assert bool(found.findings.broken_kernels) == wrong
    if not wrong:
        assert not any("kernel" in sentence for sentence in found.advice)
        return
    told = "torch's kernel of clamps on qnnpack mixes up the values of channels_last tensors"
    assert found.advice[0].startswith(told) and "in clamp (ReLU6" in found.advice[0] and "x.cont" in found.advice[0]
    assert not any("run refine" in sentence for sentence in found.advice)
    config = small_config()
    cptv_ao.refine(model, BATCHES, float_model=float_model, config=config, progress=False)
    assert any(note.startswith(told) for note in cptv_ao.report(model).notes)


@pytest.mark.parametrize("channels", [4, 8])
def test_transposed_convolutions_are_named(channels: int) -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, channels, 3), nn.ReLU(), nn.Conv2d(channels, 5, 3), nn.Flatten())

    float_model = nets.seeded(layers)
    _, model = nets.quantize(float_model, BATCHES, mapping=get_default_qconfig_mapping("x86"))
    wrong = apart(model, float_model) > 0.3
    assert wrong == (channels == 8)
    found = cptv_ao.diagnose(model, BATCHES, float_model=float_model, progress=False)
    assert bool(found.findings.broken_kernels) == wrong
    assert wrong == any("kernel of transposed convolutions on x86" in s and "(0.weight)" in s for s in found.advice)
    assert wrong != any("run refine" in sentence for sentence in found.advice)
