"""Networks around every op that torch quantizes, with all its settings, and their quantization for each engine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.backend_config import (
    get_fbgemm_backend_config,
    get_onednn_backend_config,
    get_qnnpack_backend_config,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd

from helpers import nets

ENGINES = [e for e in ("x86", "onednn", "qnnpack") if e in torch.backends.quantized.supported_engines]
BACKENDS = {
    "x86": get_fbgemm_backend_config,
    "onednn": get_onednn_backend_config,
    "qnnpack": get_qnnpack_backend_config,
}


class Around(nn.Module):
    """A layer, the op, and what makes sure that its output is quantized."""

    def __init__(self, before: nn.Module, op: Any) -> None:
        super().__init__()
        self.before, self.op = before, op

    def forward(self, x: Tensor) -> Any:
        return self.op(self.before(x))


class Pair(nn.Module):
    """An op of two values."""

    def __init__(self, op: Any, width: int = 8) -> None:
        super().__init__()
        self.left, self.right, self.op = nn.Linear(width, width), nn.Linear(width, width), op

    def forward(self, x: Tensor) -> Any:
        return self.op(self.left(x), self.right(x))


class Residual(nn.Module):
    """A convolution whose output another one's is added to; nothing else reads either."""

    def __init__(self, relu: bool, other: bool = True) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3 if other else 4, 4, 3, padding=1)
        self.relu, self.other = nn.ReLU() if relu else nn.Identity(), other

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return self.relu(self.right(x if self.other else left) + left)


class Functional(nn.Module):
    """A functional layer with its weight."""

    def __init__(self, op: Any, *shape: int, per_channel: bool = True) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.weight, self.bias, self.op = nn.Parameter(torch.randn(shape) / 3), nn.Parameter(torch.randn(4)), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight, self.bias)


def flat(op: Any) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Linear(8, 8), op)


def line(op: Any) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Conv1d(3, 4, 3, padding=1), op)


def plane(op: Any) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Conv2d(3, 4, 3, padding=1), op)


def solid(op: Any) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Conv3d(3, 4, 3, padding=1), op)


def trained(norm: nn.Module) -> nn.Module:
    """A norm with numbers of its own."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def slopes(norm: nn.PReLU) -> nn.Module:
    """A PReLU with slopes of its own."""
    nn.init.uniform_(norm.weight, 0.1, 0.9)
    return norm


def transposed(op: Any, rank: int) -> Any:
    """A transposed convolution with all its arguments, which lowering asks for."""
    return lambda x, weight, bias: op(x, weight, bias, [2] * rank, [1] * rank, [1] * rank, 1, [1] * rank)


FLAT, LINE, PLANE, SOLID = (16, 8), (4, 3, 12), (4, 3, 8, 8), (2, 3, 4, 6, 6)
F = functional
# What is quantized, the shape of its input, by a name that tells the settings.
KNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (flat(nn.Identity()), FLAT),
    "Linear without bias": (lambda: nn.Linear(8, 8, bias=False), FLAT),
    "Linear ReLU": (flat(nn.ReLU()), FLAT),
    "Linear LeakyReLU 0.5": (flat(nn.LeakyReLU(0.5)), FLAT),
    "Linear LeakyReLU 0.01": (flat(nn.LeakyReLU()), FLAT),
    "Linear Tanh": (flat(nn.Tanh()), FLAT),
    "linear": (lambda: Functional(F.linear, 4, 8), FLAT),
    "linear relu": (lambda: Around(Functional(F.linear, 4, 8), F.relu), FLAT),
    "Conv1d": (line(nn.Identity()), LINE),
    "Conv1d ReLU, stride, dilation": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2, 2, 2), nn.ReLU()), LINE),
    "Conv2d groups": (lambda: nn.Conv2d(3, 6, 3, groups=3), PLANE),
    "Conv2d stride, dilation": (lambda: nn.Conv2d(3, 6, (3, 1), (2, 1), (2, 0), (2, 1)), PLANE),
    "Conv2d ReLU": (plane(nn.ReLU()), PLANE),
    "Conv2d BatchNorm ReLU": (plane(nn.Sequential(trained(nn.BatchNorm2d(4)), nn.ReLU())), PLANE),
    "Conv3d": (solid(nn.Identity()), SOLID),
    "Conv3d ReLU": (solid(nn.ReLU()), SOLID),
    "Conv3d BatchNorm3d": (solid(trained(nn.BatchNorm3d(4))), SOLID),
    "conv1d": (lambda: Functional(lambda x, w, b: F.conv1d(x, w, b, 2, 1, 1, 1), 4, 3, 3), LINE),
    "conv2d": (lambda: Functional(lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 1), (1, 1), 1), 4, 3, 3, 3), PLANE),
    "conv3d": (
        lambda: Functional(lambda x, w, b: F.conv3d(x, w, b, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1), 4, 3, 3, 3, 3),
        SOLID,
    ),
    "Conv2d + Conv2d": (lambda: Residual(False), PLANE),
    "Conv2d + Conv2d ReLU": (lambda: Residual(True), PLANE),
    "add": (lambda: Pair(lambda a, b: a + b), FLAT),
    "add relu": (lambda: Pair(lambda a, b: F.relu(a + b)), FLAT),
    "add broadcast": (lambda: Pair(lambda a, b: a + b[:, :1]), FLAT),
    "mul": (lambda: Pair(lambda a, b: a * b), FLAT),
    "mul relu": (lambda: Pair(lambda a, b: F.relu(a * b)), FLAT),
    **{f"mul {k}": (flat(lambda x, k=k: x * k), FLAT) for k in (2.0, -0.5, 3)},
    **{f"{k} mul": (flat(lambda x, k=k: k * x), FLAT) for k in (2.0, -0.5)},
    **{f"mul {k} relu": (flat(lambda x, k=k: F.relu(x * k)), FLAT) for k in (2.0, -0.5)},
    "cat": (lambda: Pair(lambda a, b: torch.cat([a, b], 1)), FLAT),
    "cat by keywords": (lambda: Pair(lambda a, b: torch.cat([a, b], dim=-1)), FLAT),
    "stack": (lambda: Pair(lambda a, b: torch.stack([a, b], 1)), FLAT),
    "BatchNorm2d": (
        lambda: Around(nn.Conv2d(3, 4, 1), nn.Sequential(nn.MaxPool2d(1), trained(nn.BatchNorm2d(4)))),
        PLANE,
    ),
    "BatchNorm2d ReLU": (plane(nn.Sequential(nn.MaxPool2d(1), trained(nn.BatchNorm2d(4)), nn.ReLU())), PLANE),
    "BatchNorm3d": (solid(nn.Sequential(nn.AvgPool3d(1), trained(nn.BatchNorm3d(4, 0.1)))), SOLID),
    "BatchNorm3d ReLU": (solid(nn.Sequential(nn.AvgPool3d(1), trained(nn.BatchNorm3d(4)), nn.ReLU())), SOLID),
    "LayerNorm": (flat(trained(nn.LayerNorm(8))), FLAT),
    "LayerNorm eps": (flat(trained(nn.LayerNorm(8, 0.3))), FLAT),
    "LayerNorm not affine": (flat(nn.LayerNorm(8, elementwise_affine=False)), FLAT),
    "LayerNorm without bias": (flat(trained(nn.LayerNorm(8, bias=False))), FLAT),
    "LayerNorm of two": (plane(trained(nn.LayerNorm([8, 8]))), PLANE),
    "layer_norm": (flat(lambda x: F.layer_norm(x, (8,), eps=0.2)), FLAT),
    "layer_norm by keywords": (flat(lambda x: F.layer_norm(x, normalized_shape=[8])), FLAT),
    "GroupNorm": (plane(trained(nn.GroupNorm(2, 4))), PLANE),
    "group_norm": (plane(lambda x: F.group_norm(x, 2)), PLANE),
    "instance_norm": (plane(lambda x: F.instance_norm(x)), PLANE),
    "BatchNorm1d": (flat(trained(nn.BatchNorm1d(8))), FLAT),
    "InstanceNorm1d": (line(trained(nn.InstanceNorm1d(4, affine=True))), LINE),
    "InstanceNorm2d": (plane(trained(nn.InstanceNorm2d(4, 0.1, affine=True))), PLANE),
    "InstanceNorm3d": (solid(trained(nn.InstanceNorm3d(4, affine=True))), SOLID),
    "ELU": (flat(nn.ELU()), FLAT),
    "ELU alpha": (flat(nn.ELU(0.3)), FLAT),
    "elu": (flat(lambda x: F.elu(x)), FLAT),
    "elu positional": (flat(lambda x: F.elu(x, 0.3)), FLAT),
    "elu by keywords": (flat(lambda x: F.elu(x, alpha=0.3, inplace=False)), FLAT),
    "LeakyReLU slope": (plane(nn.LeakyReLU(0.4)), PLANE),
    "leaky_relu": (plane(lambda x: F.leaky_relu(x)), PLANE),
    "leaky_relu positional": (plane(lambda x: F.leaky_relu(x, 0.4)), PLANE),
    "leaky_relu by keywords": (plane(lambda x: F.leaky_relu(x, negative_slope=0.4)), PLANE),
    "Hardswish": (flat(nn.Hardswish()), FLAT),
    "hardswish": (flat(lambda x: F.hardswish(x)), FLAT),
    "Softmax": (flat(nn.Softmax(-1)), FLAT),
    "Softmax of dim 0": (flat(nn.Softmax(0)), FLAT),
    "softmax": (flat(lambda x: F.softmax(x, 0)), FLAT),
    "Sigmoid": (flat(nn.Sigmoid()), FLAT),
    "sigmoid": (flat(torch.sigmoid), FLAT),
    "sigmoid method": (flat(lambda x: x.sigmoid()), FLAT),
    "Hardsigmoid": (flat(nn.Hardsigmoid()), FLAT),
    "hardsigmoid": (flat(lambda x: F.hardsigmoid(x, True)), FLAT),
    "tanh": (plane(torch.tanh), PLANE),
    "tanh method": (plane(lambda x: x.tanh()), PLANE),
    "in place": (plane(lambda x: x.tanh_().relu_().sigmoid_()), PLANE),
    "hardtanh_": (flat(lambda x: F.hardtanh_(x.flatten(1), -0.3, 0.2)), FLAT),
    "squeeze_": (flat(lambda x: x.unsqueeze_(1).detach_().squeeze_(1)), FLAT),
    "GELU": (flat(nn.GELU()), FLAT),
    "GLU": (flat(nn.GLU()), FLAT),
    "SiLU": (flat(nn.SiLU()), FLAT),
    "Mish": (flat(nn.Mish()), FLAT),
    "Softplus": (flat(nn.Softplus()), FLAT),
    "Hardtanh": (flat(nn.Sequential(nn.Flatten(), nn.Hardtanh())), FLAT),
    "Hardtanh ends": (flat(nn.Sequential(nn.Flatten(), nn.Hardtanh(-0.2, 0.4))), FLAT),
    "hardtanh": (flat(lambda x: F.hardtanh(x, -0.2, 0.3)), FLAT),
    "ReLU6": (flat(nn.Sequential(nn.Flatten(), nn.ReLU6())), FLAT),
    "relu6": (flat(lambda x: F.relu6(x * 9.0)), FLAT),
    "relu method": (plane(lambda x: F.max_pool2d(x, 1).relu()), PLANE),
    "clamp": (flat(lambda x: x.clamp(-0.2, 0.3)), FLAT),
    "clamp min": (flat(lambda x: torch.clamp(x, min=-0.2)), FLAT),
    "clamp max": (flat(lambda x: x.clamp(max=0.3)), FLAT),
    "MaxPool1d": (line(nn.MaxPool1d(3, 2, 1)), LINE),
    "MaxPool2d": (plane(nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True)), PLANE),
    "MaxPool3d": (solid(nn.MaxPool3d(3, 2, 1)), SOLID),
    "max_pool2d": (plane(lambda x: F.max_pool2d(x, 3, 2, 1, 2, True)), PLANE),
    "AvgPool1d": (line(nn.AvgPool1d(3, 2, 1)), LINE),
    "AvgPool2d": (plane(nn.AvgPool2d(3, 2)), PLANE),
    "AvgPool2d padding counts": (plane(nn.AvgPool2d(3, 2, 1, True)), PLANE),
    "AvgPool2d padding does not count": (plane(nn.AvgPool2d(3, 2, 1, True, False)), PLANE),
    "AvgPool2d divisor": (plane(nn.AvgPool2d(2, divisor_override=3)), PLANE),
    "avg_pool2d": (plane(lambda x: F.avg_pool2d(x, 3, 1, 1, False, False)), PLANE),
    "AvgPool3d": (solid(nn.AvgPool3d(3, 2, 1, True, False)), SOLID),
    "avg_pool3d": (solid(lambda x: F.avg_pool3d(x, 2)), SOLID),
    "max_pool1d": (line(lambda x: F.max_pool1d(x, 2)), LINE),
    "max_pool3d": (solid(lambda x: F.max_pool3d(x, 2, 1)), SOLID),
    "avg_pool1d": (line(lambda x: F.avg_pool1d(x, 3, 2)), LINE),
    "adaptive_avg_pool1d": (line(lambda x: F.adaptive_avg_pool1d(x, 5)), LINE),
    "AdaptiveAvgPool1d": (line(nn.AdaptiveAvgPool1d(5)), LINE),
    "AdaptiveAvgPool2d": (plane(nn.AdaptiveAvgPool2d((3, None))), PLANE),
    "adaptive_avg_pool2d": (plane(lambda x: F.adaptive_avg_pool2d(x, 1)), PLANE),
    "AdaptiveAvgPool3d": (solid(nn.AdaptiveAvgPool3d((1, 2, None))), SOLID),
    "adaptive_avg_pool3d": (solid(lambda x: F.adaptive_avg_pool3d(x, 1)), SOLID),
    "Upsample": (plane(nn.Upsample(scale_factor=2)), PLANE),
    "Upsample bilinear": (plane(nn.Upsample(size=(5, 7), mode="bilinear")), PLANE),
    "interpolate": (plane(lambda x: F.interpolate(x, scale_factor=2)), PLANE),
    "interpolate bilinear": (plane(lambda x: F.interpolate(x, (5, 13), mode="bilinear", align_corners=True)), PLANE),
    "interpolate nearest exact": (plane(lambda x: F.interpolate(x, (5, 13), mode="nearest-exact")), PLANE),
    "interpolate area": (plane(lambda x: F.interpolate(x, (4, 4), mode="area")), PLANE),
    "mean": (plane(lambda x: x.mean((2, 3))), PLANE),
    "mean keepdim": (plane(lambda x: torch.mean(x, dim=[1], keepdim=True)), PLANE),
    "mean of all": (plane(lambda x: x.mean().reshape(1, 1)), PLANE),
    "flatten": (plane(lambda x: torch.flatten(x, 1, 2)), PLANE),
    "Flatten": (plane(nn.Flatten(2, 3)), PLANE),
    "functions that move": (plane(lambda x: torch.unsqueeze(torch.transpose(x, 1, 2), 1).squeeze(1)), PLANE),
    "squeeze of all": (plane(lambda x: torch.squeeze(x.contiguous().detach().mean((2, 3), True))), PLANE),
    "torch.relu": (plane(lambda x: torch.relu(F.max_pool2d(x, 1))), PLANE),
    "torch.add and mul": (lambda: Pair(lambda a, b: torch.mul(torch.add(a, b), b)), FLAT),
    "squeeze": (plane(lambda x: F.adaptive_avg_pool2d(x, (8, 1)).squeeze(3)), PLANE),
    "unsqueeze": (flat(lambda x: x.unsqueeze(1)), FLAT),
    "transpose": (plane(lambda x: x.transpose(1, 2)), PLANE),
    "permute": (plane(lambda x: x.permute(0, 2, 3, 1)), PLANE),
    "view": (flat(lambda x: x.view(x.shape[0], 2, -1)), FLAT),
    "reshape": (flat(lambda x: x.reshape(x.size(0), 4, 2)), FLAT),
    "repeat": (flat(lambda x: x.repeat(1, 2)), FLAT),
    "repeat_interleave method": (flat(lambda x: x.repeat_interleave(2, 1)), FLAT),
    "repeat_interleave": (flat(lambda x: torch.repeat_interleave(x, 2, 1)), FLAT),
    "narrow": (flat(lambda x: torch.narrow(x, 1, 2, 3)), FLAT),
    "getitem": (flat(lambda x: x[:, 1:5]), FLAT),
    "pixel_shuffle": (plane(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 4)), PLANE),
    "PixelShuffle": (plane(nn.PixelShuffle(2)), PLANE),
    "PixelUnshuffle": (plane(nn.PixelUnshuffle(2)), PLANE),
    "ChannelShuffle": (plane(nn.ChannelShuffle(2)), PLANE),
    "Dropout": (flat(nn.Dropout(0.5)), FLAT),
    "dropout off": (flat(lambda x: F.dropout(x, 0.5, False)), FLAT),
    "roll": (flat(lambda x: x.roll(1, 1)), FLAT),
    "pad": (plane(lambda x: F.pad(x, (1, 1, 1, 1))), PLANE),
    "Conv1d reflect": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, 2, 2, padding_mode="reflect")), LINE),
    "Conv2d reflect": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect")), PLANE),
    "Conv2d replicate": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate")), PLANE),
    "Conv2d circular": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular")), PLANE),
    "Conv2d reflect ReLU": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1, padding_mode="reflect"), nn.ReLU()),
        PLANE,
    ),
    "Conv3d replicate": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate")), SOLID),
    "ConvTranspose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), LINE),
    "ConvTranspose1d all": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 4, 2, 1, 1, dilation=2)), LINE),
    "ConvTranspose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), PLANE),
    "ConvTranspose2d all": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, (3, 2), (2, 3), (1, 0), (1, 2), 3, False, (1, 2))),
        PLANE,
    ),
    "ConvTranspose2d BatchNorm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), trained(nn.BatchNorm2d(4))),
        PLANE,
    ),
    "ConvTranspose3d": (lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 3, 2, 1, 1)), SOLID),
    "conv_transpose1d": (lambda: Functional(transposed(F.conv_transpose1d, 1), 3, 4, 3, per_channel=False), LINE),
    "conv_transpose2d": (lambda: Functional(transposed(F.conv_transpose2d, 2), 3, 4, 3, 3, per_channel=False), PLANE),
    "conv_transpose3d": (
        lambda: Functional(transposed(F.conv_transpose3d, 3), 3, 4, 3, 3, 3, per_channel=False),
        SOLID,
    ),
    "resize_": (flat(lambda x: x.resize_(16, 4)), FLAT),
    **{f"add {k}": (flat(lambda x, k=k: x + k), FLAT) for k in (0.5, -0.5, 100.0, -100.0, 0, 2)},
    **{f"{k} add": (flat(lambda x, k=k: k + x), FLAT) for k in (0.5, -100.0)},
    **{f"add {k} relu": (flat(lambda x, k=k: F.relu(x + k)), FLAT) for k in (0.5, -0.5, 100.0, -100.0)},
    "PReLU": (flat(nn.PReLU()), FLAT),
    "PReLU of channels": (plane(slopes(nn.PReLU(4))), PLANE),
    "matmul": (lambda: Pair(lambda a, b: torch.matmul(a, b.transpose(0, 1))), FLAT),
    "matmul of batches": (lambda: Pair(lambda a, b: torch.matmul(a.view(-1, 2, 8), b.view(-1, 8, 2))), FLAT),
}


def quantized(make: Callable[[], nn.Module], shape: tuple[int, ...], engine: str) -> tuple[GraphModule, Tensor]:
    """What convert_fx makes of a net, and images that it was not calibrated for."""
    model, config = nets.seeded(make, random_norms=False), BACKENDS[engine]()
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Torch has no weights per channel for these.
        whole = any(isinstance(part, (nn.PReLU, _ConvTransposeNd)) for part in model.modules())
        whole = whole or not getattr(model, "per_channel", True)
        prepared = prepare_fx(
            copy.deepcopy(model), nets.mapping(per_tensor=whole), (nets.images(*shape),), backend_config=config
        )
        prepared(2 * nets.images(*shape))
        return convert_fx(prepared, backend_config=config), nets.images(*shape, seed=1)
