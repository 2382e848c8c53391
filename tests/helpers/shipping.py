"""What is refined and shipped in another runtime: a small ViT, its batches, and how far two of its kind are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import cptv_ao
from helpers import nets
from helpers.attention import DIM, Attending
from helpers.search import small_config

BATCHES = list(nets.images(64, 3, 8, 8).split(16))
UNSEEN = nets.images(64, 3, 8, 8, seed=1).split(16)


class Tokens(Attending):
    """A ViT of one block with a class token and a position embedding, in front of channels that lie apart."""

    def __init__(self) -> None:
        super().__init__("one layer")
        self.token, self.position = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 17, DIM))
        with torch.no_grad():
            self.norm1.bias += torch.arange(DIM) * 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.proj(self.attend(self.norm1(x)))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


def outputs(model: Any, batches: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def mse(model: Any, teacher: Any, batches: Any) -> float:
    return float((outputs(model, batches) - outputs(teacher, batches)).square().mean())


def settings(**changes: Any) -> cptv_ao.RefineConfig:
    wanted: dict[str, Any] = {"evaluations": 4, "gradient_steps": 60, "loss": "mse", "holdout": 0.25}
    return small_config(**(wanted | {"population": ("curvature",)} | changes))
