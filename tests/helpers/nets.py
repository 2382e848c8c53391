"""Small networks that hold every kind of slot of scales, and stock quantization of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import GraphModule
from torch.nn import functional


class ConvNet(nn.Module):
    """Conv-bn-relu, a stand-alone bn, an in-place relu, cat, hardswish, a sigmoid gate, a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1, groups=4)
        self.pool = nn.MaxPool2d(2)
        self.act = nn.ReLU(inplace=True)
        self.bn2 = nn.BatchNorm2d(8)
        self.swish = nn.Hardswish()
        self.gate, self.sigmoid = nn.Conv2d(8, 8, 1), nn.Sigmoid()
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 4 * 4, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.pool(torch.cat([self.left(x), self.right(x)], 1))
        x = self.swish(self.bn2(x))
        x = x * self.sigmoid(self.gate(x)) * torch.sigmoid(x)
        x = self.act(self.pool(x + self.last(x)))
        x = x + self.act(x)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class FunctionalNet(nn.Module):
    """Functional linear, conv and layer_norm; an add, a scalar mul, a mul."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.kernel_bias = nn.Parameter(torch.randn(6) / 5)
        self.weight = nn.Parameter(torch.randn(10, 6) / 2)
        self.bias = nn.Parameter(torch.randn(10) / 5)
        self.norm = Norm(10)
        self.fc = nn.Linear(10, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.kernel, self.kernel_bias, (2, 2), (1, 1), (1, 1), 1)
        x = functional.relu(x).flatten(2).transpose(1, 2)
        x = functional.linear(x, self.weight, self.bias)
        y = self.fc(self.norm(x)) * 0.5
        return self.head((x + y) * y).mean(1)


class Norm(nn.LayerNorm):
    """A layer norm that is traced through, like timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


Norm.__module__ = "timm_like"  # modules of torch.nn are leaves of the tracer, this one is not


class TupleNet(nn.Module):
    """Returns a tuple or a dict of two tensors and takes keyword inputs."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.a, self.b, self.as_dict = nn.Linear(6, 6), nn.Linear(6, 3), as_dict

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        out = self.b(hidden)
        return {"logits": out, "hidden": hidden} if self.as_dict else (out, hidden)


def seeded(make: Any, seed: int = 0, *, random_norms: bool = True) -> nn.Module:
    """A network with weights that do not depend on the global generator, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and random_norms:
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model.eval()


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Normal noise (count, *shape)."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def qconfig(weight_bits: int = 8, per_tensor: bool = False) -> QConfig:
    """8-bit activations, symmetric weights."""
    half = 2 ** (weight_bits - 1)
    observer = MinMaxObserver if per_tensor else PerChannelMinMaxObserver
    scheme = torch.per_tensor_symmetric if per_tensor else torch.per_channel_symmetric
    weight = observer.with_args(dtype=torch.qint8, qscheme=scheme, quant_min=-half, quant_max=half - 1)
    return QConfig(activation=MinMaxObserver.with_args(reduce_range=True), weight=weight)


def mapping(weight_bits: int = 8, per_tensor: bool = False) -> QConfigMapping:
    """`qconfig` for everything."""
    return QConfigMapping().set_global(qconfig(weight_bits, per_tensor))


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    engine: str = "x86",
    mapping: QConfigMapping | None = None,
    weight_bits: int = 8,
    per_tensor: bool = False,
) -> tuple[GraphModule, GraphModule]:
    """Stock prepare_fx, calibration, convert_fx of a copy: the prepared and the converted model.

    Batches are tensors, or tuples of positional inputs.
    """
    mapping = mapping or QConfigMapping().set_global(qconfig(weight_bits, per_tensor))
    inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = engine
        prepared = prepare_fx(copy.deepcopy(model), mapping, inputs[0])
        for batch in inputs:
            prepared(*batch)
        return prepared, convert_fx(prepared)


def without_twin(converted: GraphModule) -> GraphModule:
    """Itself, with a hook on its head that changes what it returns a little, so that no float twin is made of it."""
    head: Any = converted.get_submodule("head")
    head.register_forward_hook(lambda module, given, output: torch.ops.quantized.mul(output, 1 + 2**-7))
    return converted
