"""Networks with a residual stream, of which two channels are outliers: some that can be rotated, some that cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import nets

WIDTH, OUTLIER, OUTLIERS = 64, 40.0, [2, 9]


def gained(norm: nn.LayerNorm) -> None:
    """Give back to the other channels what outliers take from them, as training does."""
    with torch.no_grad():
        norm.weight.normal_(6, 1)
        norm.weight[OUTLIERS] = 0.2
        norm.bias.normal_(0, 0.3)


class Branch(nn.Module):
    """What is added to a stream: a norm, two layers, factors by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.drop, self.gamma = nn.Dropout(0.1), nn.Parameter(torch.rand(WIDTH) + 0.5)
        gained(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(torch.relu(self.fc1(self.norm(x))))) * self.gamma


class Stream(nn.Module):
    """A small vision transformer without attention; two channels of its stream are outliers."""

    def __init__(self, outlier: float = OUTLIER) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.first, self.second = Branch(), Branch()
        self.norm, self.neck, self.head = nn.LayerNorm(WIDTH), nn.Identity(), nn.Linear(WIDTH, 6)
        gained(self.norm)
        with torch.no_grad():
            self.position[..., OUTLIERS[0]] += outlier
            self.first.fc2.bias[OUTLIERS[1]] -= outlier

    def embedded(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position

    def rows(self, images: Tensor) -> Tensor:
        x = self.embedded(images)
        x = x + self.first(x)
        return x + self.second(x)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.neck(self.norm(self.rows(images))[:, 0]))


class PostNorm(Stream):
    """What each branch is added to begins with a norm, in front of all but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.LayerNorm(WIDTH)
        gained(self.between)

    def rows(self, images: Tensor) -> Tensor:
        x = self.embedded(images)
        x = self.between(x + self.first(x))
        return x + self.second(x)


class SquareHead(Stream):
    """Has as many classes as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)


class Headless(Stream):
    """Returns its norm, behind an identity."""

    def forward(self, images: Tensor) -> Any:
        return self.neck(self.norm(self.rows(images))[:, 0])


class Bare(Stream):
    """Returns its norm."""

    def forward(self, images: Tensor) -> Any:
        return self.norm(self.rows(images))


class Pooled(Stream):
    """Has its head behind a mean, and a layer that reads the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(WIDTH, 6, bias=False)

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows).mean(1)) + self.side(rows[:, 0])


class Functions(Stream):
    """Its head is a function, of a weight and a bias of its own."""

    def forward(self, images: Tensor) -> Any:
        return functional.linear(self.norm(self.rows(images)), self.head.weight, self.head.bias)


class Sized(Stream):
    """Its rows are put together by sizes that it computes."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        count, places, width = rows.shape
        rows = rows.reshape(count * places, width).reshape(count, places, 2 * width // 2)
        return self.head(self.norm(rows))


class NoBias(Stream):
    """Its head has no bias, though its norm has one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 6, bias=False)
        nn.init.normal_(self.norm.bias)


class Rows(Stream):
    """Each patch has an output."""

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.rows(images)))


class Begun(Rows):
    """A norm begins the stream, and has the outliers (CLIP)."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.start, self.third, self.fourth = nn.LayerNorm(WIDTH), Branch(), Branch()
        with torch.no_grad():
            self.start.weight[OUTLIERS] = OUTLIER
            self.start.bias.normal_(0, 0.3)

    def begun(self, x: Tensor) -> Tensor:
        return self.start(x)

    def rows(self, images: Tensor) -> Tensor:
        x = self.begun(self.embedded(images))
        for branch in (self.first, self.second, self.third, self.fourth):
            x = x + branch(x)
        return x


class BegunByFunction(Begun):
    """Has the weight of that norm from a module that it does not call."""

    def begun(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), self.start.weight, self.start.bias)


class Text(nn.Module):
    """Reads words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(5, WIDTH)
        self.first, self.norm, self.head = Branch(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)
        self.register_buffer("places", torch.arange(5))
        with torch.no_grad():
            self.positions.weight[:, OUTLIERS] += OUTLIER

    def forward(self, ids: Tensor) -> Any:
        x = self.words(ids) + self.positions(self.places)
        return self.head(self.norm(x + self.first(x)))


class TiedText(Text):
    """Its head has the weight of its words."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 11)
        self.head.weight = self.words.weight


class WithRelu(Stream):
    """Something that is not linear reads the stream."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows)) + torch.relu(rows).sum()


class Returned(Stream):
    """The stream is returned, too."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images)
        return self.head(self.norm(rows)), rows


class NormTwice(Stream):
    """Its last norm is also that of the second branch."""

    def __init__(self) -> None:
        super().__init__()
        self.second.norm = self.norm


class SharedLayer(Stream):
    """A layer that writes into the stream is at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.second.fc2 = self.first.fc2


class SharedTensor(Stream):
    """A tensor of the stream is read elsewhere, too."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images) + self.token.sum()


class Scaled(Stream):
    """The norm is multiplied by itself before its head."""

    def forward(self, images: Tensor) -> Any:
        y = self.norm(self.rows(images))
        return self.head(y * y)


class Constant(Stream):
    """The stream is multiplied by a number that tracing keeps as a tensor of its own."""

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(torch.tensor(0.5) * self.rows(images)))


class Cut(Stream):
    """Half of the channels alone are read."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH // 2, 6)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.norm(self.rows(images))[..., : WIDTH // 2])


class Crossed(Stream):
    """Channels and rows change places in the stream, of which there are as many."""

    def forward(self, images: Tensor) -> Any:
        rows = self.rows(images).repeat(1, 13, 1)[:, :WIDTH]
        return self.head(self.norm(rows + rows.transpose(1, 2)))


def images(count: int = 8, seed: int = 0) -> Tensor:
    return nets.images(count, 3, 8, 8, seed=seed)


class Towers(nn.Module):
    """Two streams, of which each norm is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Bare(), Bare()

    def forward(self, images: Tensor) -> Any:
        return self.left(images), self.right(images)
