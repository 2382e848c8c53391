"""What running a network costs, and on how many images that is worth it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.image_subsets import Split, spread_images
from cptv_ao.fx.running import run

# Images that are timed at first; and, since what a call costs beside them is shared by a batch, as many more, this many
# times in turn, as run within these seconds.
_FEW, _TIMES, _TIMED = 2, 4, 0.1
# Share of the seconds of a limited search in which its images are run through the float network, and through the
# quantized one as it is, in another form, and with the first proposal; the share that may go into as many of them as
# are enough; and images, and held-out ones, without which no loss says anything.
_SCORED, SCORED_FORWARDS, _SCORED_FEW, _LEAST, _LEAST_HELD_OUT = 0.05, 3, 0.1, 16, 4
# So many are enough, of embeddings and of classes: cosines differ from image to image by about their mean, the KL by
# two to four times that.
_ENOUGH, _ENOUGH_OF_CLASSES = 64, 256
# What a search is planned for where no seconds are given, in floating point operations: some ten minutes of one core,
# or minutes of a GPU.
_SEARCH, _SEARCH_ON_GPU = 2.5e13, 2.5e15
# What scoring once may take beside a GPU, where no seconds are given: kernels have a hundredth of its speed.
_SCORED_BESIDE_GPU = 1e13


#: Of a forward of one image: in float, and quantized.
Seconds = tuple[float, float]


@dataclass(frozen=True)
class Cost:
    """Of one forward of one image through the float network.

    What depends on `flops` alone is the same on every machine; seconds are asked only where a search is limited by
    them.

    Attributes:
        flops: floating point operations of products and convolutions.
        seconds: on this machine.
        kernel_seconds: of a forward of one image through the quantized network.
        limit: `RefineConfig.max_seconds`.
        search: floating point operations that a search is planned for where no seconds are given.
        scored: floating point operations that scoring all images once may take.
    """

    flops: float = 1.0
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    limit: float | None = None
    search: float = _SEARCH
    scored: float = math.inf

    @property
    def measured(self) -> Seconds:
        """What the search plans by."""
        return self.seconds, self.kernel_seconds

    def images(self, most: int, *, forwards: float, share: float, least: int = 2) -> int:
        """How many images one stage runs on.

        Args:
            most: beyond which more say nothing new.
            forwards: that the stage costs an image, in those of the float network.
            share: of the search that it may take.
            least: without which the stage says nothing.
        """
        worth = self.flops_of(share) / (forwards * self.flops)
        return max(min(most, int(worth)), min(least, most))

    def flops_of(self, share: float) -> float:
        """Floating point operations that a stage may take which has such a share of the search."""
        if self.limit is None or self.seconds <= 0:
            return share * self.search
        return share * self.limit / self.seconds * self.flops


def cost_of(
    teacher: nn.Module,
    model: nn.Module,
    batch: Batch,
    limit: float | None,
    world: World = ALONE,
    planned: Seconds | None = None,
    device: str = "cpu",
) -> Cost:
    """Run a float network, and where time is limited the quantized one too, on a few images of a batch, or on all of
    them where they cannot be cut.

    Args:
        limit: seconds that the search may take.
        world: the ranks that all do so; rank 0 tells the time.
        planned: seconds that were measured before, to plan by again.
        device: where the float network runs, and all proposals are made.
    """
    counter, one = _Flops(), batch.few(1)
    with torch.no_grad(), counter:
        run(teacher, one, 0)
    seconds = planned or (0.0, 0.0)
    if limit is not None and planned is None:
        with torch.no_grad():
            run(model, one, 0)  # what a first run does besides
            seconds = world.first(_seconds(teacher, batch)), world.first(_seconds(model, batch))
    search, scored = (_SEARCH, math.inf) if is_cpu(device) else (_SEARCH_ON_GPU, _SCORED_BESIDE_GPU)
    return Cost(max(counter.total / one.images, 1.0), *seconds, limit, search, scored)


def halved(most: int, least: int, flops: Callable[[int], float], most_flops: float) -> int:
    """How many of something: as many as there may be, halved until they take so many floating point operations at most,
    or are the least that say anything."""
    while most > least and flops(most) > most_flops:
        most //= 2
    return most


def _seconds(model: nn.Module, batch: Batch) -> float:
    """Of a forward of one image among others of a batch."""
    few = batch.few(_FEW)
    while True:
        started = time.monotonic()
        run(model, few, 0)
        took = time.monotonic() - started
        if took > _TIMED or few.images >= batch.images:
            return took / few.images
        few = batch.few(_TIMES * few.images)


def affordable(split: Split, cost: Cost, whole: bool, of_classes: bool = False) -> Split:
    """Of the images that were given, those that a search scores: all, or as many as a share of its seconds pays for.

    Args:
        whole: take batches as they are, for a loss that compares images.
        of_classes: the loss is one of class probabilities, which few images make the most of.
    """
    pays = cost.scored / cost.flops
    if cost.limit is not None and cost.seconds:
        most = cost.limit / (cost.seconds + SCORED_FORWARDS * cost.kernel_seconds)
        enough = _ENOUGH_OF_CLASSES if of_classes else _ENOUGH
        pays = max(_SCORED * most, min(_SCORED_FEW * most, enough))
    if pays >= split.images:
        return split
    share = max(int(pays), _LEAST) / split.images

    def few(part: Sequence[Batch], least: int) -> tuple[Batch, ...]:
        worth = round(share * sum(batch.images for batch in part))
        return tuple(spread_images(part, max(least, worth), whole))

    return Split(few(split.search, 2), few(split.holdout, _LEAST_HELD_OUT))


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch's own table knows to count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count: Callable[..., Any] | None = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += float(count(*args, **(kwargs or {}), out_val=result))
        return result
