"""When a candidate is given up before it is scored on all images."""

from __future__ import annotations

import math

#: A raced candidate is dropped once its loss on the first wave is above the parent's by this fraction. With k of n
#: waves seen the fraction is lower by sqrt((n - k) / (k (n - 1))), as the error of a mean without replacement is.
RACE_MARGIN = 0.05
#: Rejection is decided after each wave of batches, about so many per candidate however the loader cuts its batches: the
#: decisions depend neither on that nor on how many ranks share a wave.
WAVES = 8


def waves_of(batches: int, first: int = 0, most: int = WAVES) -> list[list[int]]:
    """The indices of batches in the order in which they are scored, from `first` (modulo their number) on, cut where
    rejection is decided."""
    start = first % batches
    order = [*range(start, batches), *range(start)]
    size = math.ceil(batches / most)
    return [order[begin : begin + size] for begin in range(0, batches, size)]


def margin(seen: int, waves: int) -> float:
    """By which fraction a candidate may be behind its parent when so many waves of all are seen."""
    return RACE_MARGIN * math.sqrt((waves - seen) / (seen * max(waves - 1, 1)))
