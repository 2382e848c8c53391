"""A network with norms that FX does not fuse, and channels of very different sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import nets


class TracedNorm(nn.BatchNorm2d):
    """A batch norm that FX traces through and does not fuse, like timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 1.0, self.eps
        )


TracedNorm.__module__ = "timm_like"


class Unfused(nn.Module):
    """Convolutions with unfused norms, with and without bias; one whose output somebody else reads; outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), TracedNorm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), TracedNorm(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), TracedNorm(8)
        self.norm, self.fc = nets.Norm(8), nn.Linear(8, 8)
        self.kept = nets.Norm(8)
        self.head, self.side = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        y = self.conv3(x)
        x = (self.bn3(y) + y).mean((2, 3))
        y = self.kept(x + self.fc(self.norm(x)))
        return self.head(y) + self.side(functional.hardswish(y))


def uneven() -> nn.Module:
    """Channels of very different sizes, which norms make alike but for gains of zero, of hardly anything, negative."""
    model: Any = nets.seeded(Unfused)
    with torch.no_grad():
        for conv in (model.conv1, model.conv2, model.conv3):
            conv.weight.mul_(torch.logspace(-1, 1, 8).reshape(8, 1, 1, 1))
        model.train()(nets.images(64, 3, 8, 8, seed=1))  # statistics
        model.eval()
        model.bn1.weight.copy_(torch.tensor([1.0, -1.0, 0.5, 1e-7, 0.0, 2.0, -0.2, 1.0]))
        model.bn1.bias[3] = 3.0
        model.norm.weight[2] *= 60
        model.norm.bias[2] *= 60
        model.fc.weight[:, 2] /= 60
    return model
