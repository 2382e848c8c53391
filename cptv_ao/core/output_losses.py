"""One loss of several outputs: the mean of their own ones, each as a share of what an output is worth.

That is what the best output would lose that is the same for all images, beyond what the float network's own would (0,
but for InfoNCE): 0 is the float network, 1 says nothing of an image. So logits, a regression in millimetres and a mask
count alike, whatever their numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cptv_ao.core.loss_curvature import direction
from cptv_ao.core.losses import JointLoss, Loss, get_exact_loss, get_loss
from cptv_ao.core.packed_outputs import Columns, PackedOutputs

# An output that hardly varies is measured by so much of what zeros in its place would lose, at least.
_FLOOR = 1e-3
# Share of the largest number of an output by which it may vary and be the same for all images: a float forward of
# another batch differs by as much.
_SAME = 1e-6


@dataclass(frozen=True)
class OutputTerm:
    """How one output counts.

    Attributes:
        name: of the output.
        loss: name of a loss, or a function.
        size: what an output is worth, in this loss.
        variance: of the output's numbers, by which a function is weighed that nobody knows.
        followed: whether a descent can follow it.
    """

    name: str
    loss: str | Loss
    size: float = 1.0
    variance: float = 1.0
    followed: bool = True

    @property
    def loss_name(self) -> str:
        """In words."""
        return self.loss if isinstance(self.loss, str) else str(getattr(self.loss, "__name__", "loss"))

    def view(self, columns: Columns, packed: Tensor) -> Tensor:
        """The output as its loss compares it: by place, or as one row of an image."""
        by_place = isinstance(self.loss, str) and "infonce" not in self.loss
        return columns.places(packed) if by_place else columns.of(packed)


@dataclass(frozen=True)
class OutputLosses(JointLoss):
    """The loss of packed outputs.

    Args:
        packing: by which they were packed.
        parts: one for each of its outputs; None: it does not count.
        temperature: of InfoNCE.
    """

    packing: PackedOutputs
    parts: tuple[OutputTerm | None, ...]
    temperature: float
    __name__: str = field(init=False, default="")

    def __post_init__(self) -> None:
        counted = self.counted
        named = counted[0].loss_name if len(counted) == 1 else f"mean of {len(counted)} outputs"
        object.__setattr__(self, "__name__", named)

    @property
    def counted(self) -> list[OutputTerm]:
        """The parts that count."""
        return [part for part in self.parts if part is not None]

    @property
    def losses(self) -> tuple[str | Loss, ...]:
        return tuple(part.loss for part in self.counted)

    def __call__(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        found = []
        for part, columns in self._views(candidate):
            got = part.view(columns, candidate if part.followed else candidate.detach())
            loss = get_loss(part.loss, self.temperature)(got, part.view(columns, teacher))
            found.append(loss.to(candidate) / part.size)
        return torch.stack(found).mean()

    def each(self, candidate: Tensor, teacher: Tensor) -> Tensor:
        found = []
        for part, columns in self._views(candidate):
            loss = get_exact_loss(part.loss, self.temperature)
            found.append(float(loss(part.view(columns, candidate), part.view(columns, teacher))) / part.size)
        return torch.tensor(found, dtype=torch.float64)

    def direction(self, outputs: Tensor, noise: Tensor) -> Tensor:
        found = []
        for part, columns in self._views(outputs):
            own = part.view(columns, outputs)
            scale = len(outputs) / (part.size * len(own))  # of the mean over places
            if not isinstance(part.loss, str):
                scale *= 2 * part.size / (own.shape[1] * part.variance)
            elif part.loss == "mse":
                scale *= 2 / own.shape[1]
            found.append(math.sqrt(scale) * direction(part.loss, own, part.view(columns, noise)))
        return torch.stack(found).sum()

    def _views(self, packed: Tensor) -> list[tuple[OutputTerm, Columns]]:
        pairs = zip(self.parts, self.packing.columns(packed), strict=True)
        return [(part, columns) for part, columns in pairs if part is not None]


def is_constant(packing: PackedOutputs, index: int, targets: Sequence[Tensor]) -> bool:
    """Whether an output of the teacher is the same for all images.

    Args:
        index: of the output.
        targets: packed, by batch.
    """
    columns = [packing.columns(packed)[index] for packed in targets]
    return all_alike([packed[:, own.start : own.stop] for packed, own in zip(targets, columns, strict=True)])


def all_alike(outputs: Sequence[Tensor]) -> bool:
    """Whether rows (N, C) are the same in all batches; those of another length are compared with one another."""
    first: dict[int, Tensor] = {}
    for own in outputs:
        wanted = first.setdefault(own.shape[1], own[:1])
        if bool((own - wanted).abs().amax() > _SAME * wanted.abs().amax()):
            return False
    return True


def measured(
    part: OutputTerm, packing: PackedOutputs, index: int, targets: Sequence[Tensor], temperature: float
) -> tuple[float, float]:
    """What an output is worth in its loss, beyond what its own float values lose, and the variance of its numbers.

    Args:
        part: names the output and its loss.
        index: of the output.
        targets: packed, by batch.
        temperature: of InfoNCE.
    """
    loss = get_exact_loss(part.loss, temperature)
    best, mean = _constant(part, packing, index, targets), _mean(packing, index, targets)
    at_best = at_zero = at_least = spread = images = 0.0
    for packed in targets:
        columns = packing.columns(packed)[index]
        teacher, count = part.view(columns, packed), len(packed)
        same, none = (columns.everywhere(v.to(packed), packed) for v in (best, torch.zeros_like(best)))
        at_best += float(loss(part.view(columns, same), teacher)) * count
        at_zero += float(loss(part.view(columns, none), teacher)) * count
        at_least += float(loss(teacher, teacher)) * count
        spread += float((columns.places(packed).double() - mean).square().mean()) * count
        images += count
    size = max(at_best - at_least, _FLOOR * (at_zero - at_least)) / images
    return size if math.isfinite(size) and size > 0 else 1.0, spread / images or 1.0


def _constant(part: OutputTerm, packing: PackedOutputs, index: int, targets: Sequence[Tensor]) -> Tensor:
    """What of each channel (C,) loses least, where it is the same for all images and places."""
    if part.loss == "kl":
        return _mean(packing, index, targets, lambda rows: rows.softmax(1)).clamp_min(1e-30).log()
    if part.loss in ("cosine", "infonce", "soft_infonce"):
        return _mean(packing, index, targets, lambda rows: torch.nn.functional.normalize(rows, dim=1))
    return _mean(packing, index, targets)


def _mean(
    packing: PackedOutputs,
    index: int,
    targets: Sequence[Tensor],
    change: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """The mean over images and places, (C,) in float64."""
    total: Tensor | float = 0.0
    for packed in targets:
        rows = packing.columns(packed)[index].places(packed).double()
        total = total + change(rows).mean(0) * len(packed)
    assert isinstance(total, Tensor)
    return total / sum(len(packed) for packed in targets)
