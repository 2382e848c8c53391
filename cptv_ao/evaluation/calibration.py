"""What the models of one search are scored on: images, and what the teacher makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import CalibrationDataError
from cptv_ao.core.losses import compares_images
from cptv_ao.evaluation.cost import Cost
from cptv_ao.evaluation.teacher import teacher_outputs
from cptv_ao.simulation.simulated_backend import SimulatedBackend

# Images on which kernels are compared with exact arithmetic, and what that costs an image, in float forwards.
_PROBE_IMAGES, PROBE_FORWARDS = 16, 6


def check_negatives(config: RefineConfig, batches: Sequence[Batch]) -> None:
    """InfoNCE takes its negatives from the batch: one image has none."""
    loss = compares_images(config.loss)
    if loss is None:
        return
    for index, batch in enumerate(batches):
        if batch.images < 2:
            raise CalibrationDataError(
                f"calib_loader, batch {index}: {loss} needs at least 2 images per batch for its negatives, "
                "got 1; use larger batches (the paper: 100), drop_last=True, or another loss",
                index,
            )


@dataclass(frozen=True)
class Images:
    """Batches, and the teacher's output (N, C) on each."""

    batches: tuple[Batch, ...]
    targets: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """Of all batches."""
        return sum(batch.images for batch in self.batches)

    def mean(self, loss: Callable[[int, Batch, Tensor], float]) -> float:
        """Over the images, of what each batch has: by its index, the batch and its target."""
        rows = zip(self.batches, self.targets, strict=True)
        return sum(loss(i, batch, target) * batch.images for i, (batch, target) in enumerate(rows)) / self.count

    @staticmethod
    def of(batches: Sequence[Batch], teacher: nn.Module, config: RefineConfig, world: World = ALONE) -> Images:
        """Run the teacher once."""
        targets = teacher_outputs(teacher, batches, config.select, world)
        return Images(tuple(batches), tuple(targets))


@dataclass(frozen=True)
class Pool:
    """Images that a descent may learn from, more than are scored: there is no time to run the teacher on all of them.

    Attributes:
        batches: of the loader, without held-out ones.
        teach: runs the teacher on a part of them: its output (N, C), the same on all ranks.
    """

    batches: tuple[Batch, ...]
    teach: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Calibration:
    """What the models of one search are scored on, and how.

    Attributes:
        config: for the loss.
        search, holdout: images of all ranks.
        world: the ranks that share the batches.
        cost: of a forward of the teacher.
        pool: more images to learn from; None where all are scored.
    """

    config: RefineConfig
    search: Images
    holdout: Images = Images((), ())
    world: World = ALONE
    cost: Cost = field(default_factory=Cost)
    pool: Pool | None = None

    @property
    def images(self) -> int:
        """Those that are searched on and held out."""
        return self.search.count + self.holdout.count

    @property
    def probe(self) -> Batch:
        """The few on which kernels are compared with exact arithmetic."""
        return self.search.batches[0].few(self.cost.images(_PROBE_IMAGES, forwards=PROBE_FORWARDS, share=0.01))


def on_device(simulated: SimulatedBackend, images: Images) -> Images:
    """Images and targets where the twin computes."""
    device = simulated.twin.device
    return Images(
        tuple(simulated.batch(batch) for batch in images.batches), tuple(t.to(device) for t in images.targets)
    )
