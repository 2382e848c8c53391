"""Small random FX models: refine does no harm to them, or says clearly why it cannot work.

25 of them in a usual run; `CPTV_AO_EXAMPLES=200 python -m pytest tests/contract/test_random_models.py` tries more.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.search import small_config
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import cptv_ao

CHANNELS, SIDE = 4, 6
# Steps on images (N, C, H, W), then on rows (N, C).
IMAGE_STEPS = (
    "conv", "depthwise", "conv_bn_relu", "bn", "relu", "relu6", "hardswish", "sigmoid_gate", "residual", "cat", "mul",
    "scale", "pool", "again", "functional_conv", "permute", "interpolate", "silu", "relu_in_place", "leaky",
)  # fmt: skip
ROW_STEPS = (
    "linear", "linear_relu", "functional_linear", "norm", "functional_norm", "residual", "cat", "mul", "scale", "again",
    "gelu", "softmax", "tanh", "chunk", "elu",
)  # fmt: skip


class Random(nn.Module):
    """Steps on images, then on rows; every step keeps the shape."""

    def __init__(self, image_steps: list[str], row_steps: list[str], unused: bool) -> None:
        super().__init__()
        self.image_steps, self.row_steps, self.unused = image_steps, row_steps, unused
        for i, step in enumerate([*image_steps, *row_steps]):
            self.add_module(f"step{i}", self._module(step, i >= len(image_steps)))
        self.kernel, self.matrix = (nn.Parameter(torch.randn(*s) / 3) for s in ((4, 4, 3, 3), (4, 4)))
        self.shared_conv, self.shared_fc = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, 3)

    def _module(self, step: str, rows: bool) -> nn.Module:
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        made: dict[str, nn.Module] = {
            "conv": conv,
            "depthwise": nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
            "conv_bn_relu": nn.Sequential(conv, nn.BatchNorm2d(CHANNELS), nn.ReLU()),
            "bn": nn.BatchNorm2d(CHANNELS),
            "relu6": nn.ReLU6(),
            "hardswish": nn.Hardswish(),
            "relu_in_place": nn.ReLU(inplace=True),
            "linear": nn.Linear(CHANNELS, CHANNELS),
            "linear_relu": nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU()),
            "norm": nn.LayerNorm(CHANNELS),
            "residual": nn.Linear(CHANNELS, CHANNELS) if rows else conv,
            "cat": nn.Linear(2 * CHANNELS, CHANNELS) if rows else nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
            "silu": nn.SiLU(),
            "leaky": nn.LeakyReLU(),
            "elu": nn.ELU(),
        }
        return made.get(step, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.image_steps):
            x = self._image(step, getattr(self, f"step{i}"), x)
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.unused:
            self.shared_fc(x)
        for i, step in enumerate(self.row_steps, len(self.image_steps)):
            x = self._row(step, getattr(self, f"step{i}"), x)
        return self.head(x)

    def _image(self, step: str, module: nn.Module, x: Tensor) -> Tensor:
        other: dict[str, Any] = {
            "pool": lambda: functional.max_pool2d(x, 3, 1, 1),
            "again": lambda: self.shared_conv(x),
            "functional_conv": lambda: functional.conv2d(x, self.kernel, None, (1, 1), (1, 1), (1, 1), 1),
            "permute": lambda: x.permute(0, 1, 3, 2),
            "interpolate": lambda: functional.interpolate(x, size=(SIDE, SIDE)),
            "cat": lambda: module(torch.cat([x, functional.relu(x)], 1)),
        }
        return other[step]() if step in other else self._any(step, module, x)

    def _row(self, step: str, module: nn.Module, x: Tensor) -> Tensor:
        other: dict[str, Any] = {
            "again": lambda: self.shared_fc(x),
            "functional_linear": lambda: functional.linear(x, self.matrix),
            "functional_norm": lambda: functional.layer_norm(x, (CHANNELS,)),
            "cat": lambda: module(torch.cat([x, x], 1)),
            "chunk": lambda: torch.cat(list(_halves(x)), 1),
        }
        return other[step]() if step in other else self._any(step, module, x)

    def _any(self, step: str, module: nn.Module, x: Tensor) -> Tensor:
        other: dict[str, Any] = {
            "relu": lambda: functional.relu(x),
            "sigmoid_gate": lambda: x * torch.sigmoid(x),
            "residual": lambda: x + module(x),
            "mul": lambda: x * x,
            "scale": lambda: x * 0.5,
            "gelu": lambda: functional.gelu(x),
            "softmax": lambda: functional.softmax(x, -1),
            "tanh": lambda: torch.tanh(x),
        }
        return other[step]() if step in other else module(x)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = x.chunk(2, 1)
    return right, left


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, int, bool, str]:
    """A network, its weight bits, per-tensor weights, the engine."""
    image_steps = draw(st.lists(st.sampled_from(IMAGE_STEPS), max_size=5))
    row_steps = draw(st.lists(st.sampled_from(ROW_STEPS), max_size=4))
    unused, seed = draw(st.booleans()), draw(st.integers(0, 99))
    model = nets.seeded(lambda: Random(image_steps, row_steps, unused), seed)
    engines = [e for e in ("x86", "onednn", "qnnpack") if e in torch.backends.quantized.supported_engines]
    return model, draw(st.sampled_from((2, 4, 8))), draw(st.booleans()), draw(st.sampled_from(engines))


@settings(
    max_examples=int(os.environ.get("CPTV_AO_EXAMPLES", "25")),
    deadline=None,
    derandomize="CPTV_AO_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@pytest.mark.slow
@given(models())
def test_refine_does_no_harm(drawn: tuple[nn.Module, int, bool, str]) -> None:
    float_model, bits, per_tensor, engine = drawn
    batches = list(nets.images(8, CHANNELS, SIDE, SIDE).split(2))
    try:
        _, model = nets.quantize(float_model, batches, weight_bits=bits, per_tensor=per_tensor, engine=engine)
        given_outputs = model(batches[0])
    except (RuntimeError, AttributeError, AssertionError) as error:
        event(f"torch.ao cannot: {type(error).__name__}")
        reject()  # there is nothing to refine
    before = copy.deepcopy(model)
    weights = {name: value.clone() for name, value in float_model.state_dict().items()}
    config = small_config(evaluations=3, gradient_steps=3, population=("output_error", "ranges"))
    try:
        cptv_ao.refine(model, batches, float_model=float_model, config=config, progress=False)
    except cptv_ao.CptvError as error:
        event(f"refused: {error}")
        unchanged = torch.equal(model(batches[0]), given_outputs)
        if unchanged:
            return
        raise
    report = cptv_ao.report(model)
    assert report.after.search <= report.before.search
    assert report.after.holdout is not None
    assert report.before.holdout is not None
    assert report.after.holdout <= report.before.holdout
    assert bool(torch.isfinite(model(batches[0])).all())
    assert not any("no proposals" in note for note in report.notes), report.notes
    assert cptv_ao.find_sites(model).unknown == ()
    if not report.moves:
        assert torch.equal(model(batches[0]), before(batches[0]))
    assert all(torch.equal(value, weights[name]) for name, value in float_model.state_dict().items())
