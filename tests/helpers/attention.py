"""A block of a ViT as a PT2E graph, with channels that lie apart."""

from __future__ import annotations

from typing import Any

import torch
import workloads
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import cptv_ao
from cptv_ao.backends.backend import Backend
from cptv_ao.core.events import Callback
from helpers import nets
from helpers.search import small_config

DIM, HEADS = 8, 2


BATCHES = tuple(nets.images(32, 3, 8, 8).split(8))


class Attending(nn.Module):
    """One block of a ViT, in the forms that attention is written in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.patch = form, nn.Conv2d(3, DIM, 2, 2)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.fc1, self.fc2, self.head = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x).mean(1))

    def attend(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        if self.form == "three layers":
            parts = [layer(x).reshape(images, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            mixed = functional.scaled_dot_product_attention(*parts)
        elif self.form == "softmax":
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (part.reshape(images, tokens, HEADS, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, training=False) @ v
        else:
            q, k, v = self.qkv(x).reshape(images, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(images, tokens, DIM)


class Gated(Attending):
    """The values are read once more, from a slice of their own."""

    def attend(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        q, k, v, gate = y[..., :DIM], y[..., DIM : 2 * DIM], y[..., 2 * DIM :], y[..., 2 * DIM :]
        return functional.scaled_dot_product_attention(q * gate.sigmoid(), k, v)


def apart(make: Any = Attending, form: str = "fused", outlier: float = 1.0) -> Any:
    """A network whose channels lie apart, and one of them behind the first norm so many times larger."""
    model: Any = nets.seeded(lambda: make(form))
    offsets = torch.linspace(-3, 3, DIM)
    with torch.no_grad():
        model.norm1.bias += offsets
        model.norm2.bias -= offsets
        model.qkv.bias[2 * DIM :] += offsets
        model.v.bias += offsets
        model.norm1.weight[2] *= outlier
        model.norm1.bias[2] *= outlier
        model.qkv.weight[:, 2] /= outlier
    return model


def quantized(model: nn.Module, bits: int = 4, fold: bool = True) -> GraphModule:
    return workloads.quantize_exported(model, BATCHES, weight_bits=8, activation_bits=bits, fold_quantize=fold)


def steps(backend: Backend) -> dict[str, float]:
    return {name: float(backend.read(name).scale) for name, s in backend.sites.items() if s.kind == "activation"}


NOTE = "the channels of 3 inputs of linear layers moved to the middle of their ranges"


def refine(graph: GraphModule, model: nn.Module, callback: Callback | None = None, **changes: Any) -> None:
    config = small_config(**changes)
    cptv_ao.refine(graph, BATCHES, float_model=model, config=config, callback=callback, progress=False)
