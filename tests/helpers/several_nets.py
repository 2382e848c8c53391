"""Networks with outputs of any kind: several, of any rank, in any nesting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from helpers import nets


@dataclass
class Answer:
    """As a network may return it."""

    logits: Tensor
    box: Tensor
    hidden: Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """As transformers has it: a dict whose values are attributes, too, and that leaves out what is None."""

    def __init__(self, **parts: Any) -> None:
        super().__init__({name: part for name, part in parts.items() if part is not None})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


# What torch.export returns must be known to it.
pytree.register_pytree_node(
    Answer, lambda found: ([found.logits, found.box, found.hidden], None), lambda parts, _: Answer(*parts)
)
pytree.register_pytree_node(
    ModelOutput,
    lambda found: (list(found.values()), tuple(found)),
    lambda parts, names: ModelOutput(**dict(zip(names, parts, strict=True))),
)


class Trunk(nn.Module):
    """Two convolutions; what returns makes of a map (N, 12, 8, 8) and its mean (N, 12) what it returns."""

    def __init__(self, returns: Callable[[Trunk, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.classes, self.number, self.box = nn.Linear(12, 5), nn.Linear(12, 1), nn.Linear(12, 4)
        self.map, self.mask = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 1, 1)
        self.map2, self.mask2 = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 1, 1)
        self.register_buffer("anchors", torch.arange(8.0).reshape(2, 4))
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        features = self.conv2(self.conv1(x).relu()).relu()
        return self.returns(self, features, features.mean((2, 3)))


class Sequences(nn.Module):
    """Tokens and their mean, of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.layer(x).relu()
        return tokens, self.head(tokens.mean(1))


def heads(net: Trunk, features: Tensor, pooled: Tensor) -> Any:
    logits = net.classes(pooled)
    return {
        "logits": logits, "age": net.number(pooled).squeeze(1) * 30 + 40, "mask": net.mask(features),
        "label": logits.argmax(1), "anchors": net.anchors, "prior": torch.zeros_like(pooled) + 0.5,
    }  # fmt: skip


def tokens(net: Trunk, features: Tensor, pooled: Tensor) -> Any:
    return net.map(features).flatten(2).transpose(1, 2)


def detector(net: Trunk, features: Tensor, pooled: Tensor) -> Any:
    small = features[:, :, ::2, ::2]
    return [net.map(features), net.map2(small)], [net.mask(features).sigmoid(), net.mask2(small).sigmoid()]


RETURNS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "heads": (heads, {"logits": "mse", "age": "mse", "mask": "mse"}),
    "segmenter": (lambda net, features, pooled: net.map(features), {"output": "mse"}),
    "tokens": (tokens, {"output": "mse"}),
    "tokens and pooled": (
        lambda net, features, pooled: (tokens(net, features, pooled), pooled), {"0": "mse", "1": "cosine"},
    ),
    "detector": (detector, {name: "mse" for name in ("0.0", "0.1", "1.0", "1.1")}),
    "dataclass": (
        lambda net, features, pooled: Answer(net.classes(pooled), net.box(pooled)), {"logits": "mse", "box": "mse"},
    ),
    "model output": (
        lambda net, features, pooled: ModelOutput(logits=net.classes(pooled).half(), loss=None, box=net.box(pooled)),
        {"logits": "mse", "box": "mse"},
    ),
    "one in a dict": (lambda net, features, pooled: {"a": net.classes(pooled).argmax(1), "b": net.classes(pooled)},
        {"b": "kl"}),
}  # fmt: skip


def made(name: str, count: int = 96) -> tuple[nn.Module, list[Tensor]]:
    """A network, and its images in batches of 16."""
    net = nets.seeded(lambda: Trunk(RETURNS[name][0]))
    return net, list(nets.images(count, 3, 8, 8).split(16))
