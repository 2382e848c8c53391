"""The images of the steps of a descent, and what the teacher makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.evaluation.calibration import Calibration

# What the steps of a descent may cost that are more than were asked for since they are shorter, in floating point
# operations of forwards of the float network.
_DESCENT = 3e13


class StepImages:
    """Batches for steps: those of the loader, cut where they are larger than a step takes.

    Targets that nobody knows yet are asked for when a step first needs them.

    Args:
        calibration: whose search images they are, or those of its pool, where it has one.
        most: images of a step.
        wanted: images of a step that moves at the whole learning rate; None: it does whatever they are cut to.

    Attributes:
        rate: what is left of the learning rate: gradients of fewer images are noisier, and Adam's steps as long all the
            same, so they are cut by the square root (Malladi et al., arXiv 2205.10287).
    """

    def __init__(self, calibration: Calibration, most: int, wanted: int | None = None) -> None:
        search, pool = calibration.search, calibration.pool
        self.batches: list[Batch] = []
        self._targets: list[Tensor | None] = []
        self._teach = None if pool is None else pool.teach
        self._device = "cpu"
        known = [None] * len(pool.batches) if pool is not None else search.targets
        for batch, target in zip(search.batches if pool is None else pool.batches, known, strict=True):
            for part, rows in batch.parts(round(batch.images / most)):
                self.batches.append(part)
                self._targets.append(None if target is None else target[rows])
        each = max(most, max(batch.images for batch in self.batches))
        self.rate = 1.0 if wanted is None else math.sqrt(min(1.0, each / wanted))
        self._worth = _DESCENT / (each * calibration.cost.flops)

    def __len__(self) -> int:
        return len(self.batches)

    def steps(self, wanted: int) -> int:
        """How many go as far as so many at the whole learning rate, where they are not too dear."""
        return max(wanted, min(round(wanted / self.rate), int(self._worth)))

    def at(self, index: int) -> tuple[Batch, Tensor]:
        """A batch and the teacher's outputs (N, C) on it."""
        batch, target = self.batches[index], self._targets[index]
        if target is None:
            assert self._teach is not None
            target = self._teach(batch).to(self._device)
            self._targets[index] = target
        return batch, target

    @property
    def asks(self) -> bool:
        """Whether there are targets that nobody knows yet."""
        return any(target is None for target in self._targets)

    def ask(self, teach: Callable[[Batch], Tensor]) -> None:
        """Have targets that nobody knows yet from another teacher, which gives the same."""
        self._teach = teach

    def to(self, device: str) -> None:
        """Give all images and targets on a device."""
        self._device = device
        self.batches = [batch.to(device) for batch in self.batches]
        self._targets = [None if target is None else target.to(device) for target in self._targets]
