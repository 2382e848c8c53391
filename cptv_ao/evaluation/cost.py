"""What running a network costs, and on how many images that is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cptv_ao.core.batches import Batch, Split, spread_images
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.fx.running import run

# Images that are timed.
_FEW = 2
# Share of the seconds of a limited search that the float outputs of its images may take, and images without which no
# loss says anything.
_SCORED, _LEAST = 0.05, 10
# What one stage of a search may take where no seconds are given, in floating point operations: some 10 s of one core.
_STAGE = 5e11


@dataclass(frozen=True)
class Cost:
    """Of one forward of one image through the float network.

    What depends on `flops` alone is the same on every machine; seconds are asked only where a search is limited by
    them.

    Attributes:
        flops: floating point operations of products and convolutions.
        seconds: on this machine.
        limit: `RefineConfig.max_seconds`.
    """

    flops: float = 1.0
    seconds: float = 0.0
    limit: float | None = None

    def images(self, most: int, *, forwards: float, share: float, least: int = 2) -> int:
        """How many images one stage runs on.

        Args:
            most: beyond which more say nothing new.
            forwards: that the stage costs an image, in those of the float network.
            share: of the seconds of a limited search that it may take.
            least: without which the stage says nothing.
        """
        worth = _STAGE / (forwards * self.flops)
        if self.limit is not None and self.seconds > 0:
            worth = min(worth, share * self.limit / (forwards * self.seconds))
        return max(min(most, int(worth)), min(least, most))


def cost_of(
    teacher: nn.Module, batch: Batch, limit: float | None, world: World = ALONE, seconds: float | None = None
) -> Cost:
    """Run a float network on a few images of a batch, or on all of them where they cannot be cut.

    Args:
        limit: seconds that the search may take.
        world: the ranks that all do so; rank 0 tells the time.
        seconds: those that were measured before, to plan by again.
    """
    counter, one = _Flops(), batch.few(1)
    with torch.no_grad(), counter:
        run(teacher, one, 0)
    if seconds is None:
        seconds = 0.0 if limit is None else world.first(_seconds(teacher, batch.few(_FEW)))
    return Cost(max(counter.total / one.images, 1.0), seconds, limit)


def _seconds(teacher: nn.Module, few: Batch) -> float:
    """Of a forward of one image among a few."""
    started = time.monotonic()
    with torch.no_grad():
        run(teacher, few, 0)
    return (time.monotonic() - started) / few.images


def affordable(split: Split, cost: Cost, whole: bool) -> Split:
    """Of the images that were given, those that a search scores: all, or as many as a share of its seconds pays for.

    Args:
        whole: take batches as they are, for a loss that compares images.
    """
    if cost.limit is None or not cost.seconds:
        return split
    share = max(int(_SCORED * cost.limit / cost.seconds), _LEAST) / split.images

    def few(part: Sequence[Batch]) -> tuple[Batch, ...]:
        worth = round(share * sum(batch.images for batch in part))
        return tuple(spread_images(part, max(2, worth), whole))

    return Split(few(split.search), few(split.holdout))


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
