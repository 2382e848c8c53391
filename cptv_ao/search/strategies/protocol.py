"""The ask / tell protocol between the loop in `refine` and a search strategy.

A strategy sees vectors of float64 and losses, never a graph. A vector holds the linear scales and zero_points of
the groups of one block, laid out as its `Layout` says. The loop owns evaluation: it repairs a vector to what the
kernels can hold before it scores it, so `tell` reports the vector that was really scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cptv_ao.core.sites import SiteKind

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Slices of the vector that hold the scales and zero_points of one tied group of sites.

    `zero_points` is None where they cannot move; `qmin`, `qmax` bound them otherwise.
    """

    name: str
    kind: SiteKind
    scales: slice
    zero_points: slice | None
    qmin: int
    qmax: int


@dataclass(frozen=True)
class Layout:
    """What each entry of a vector of `size` entries means."""

    groups: tuple[Group, ...]
    size: int

    def mask(self, *, scales: bool = True, zero_points: bool = False) -> NDArray[np.bool_]:
        """Boolean mask (size,) of the entries that are scales and / or zero_points."""
        mask = np.zeros(self.size, dtype=bool)
        for group in self.groups:
            if scales:
                mask[group.scales] = True
            if zero_points and group.zero_points is not None:
                mask[group.zero_points] = True
        return mask


@dataclass(frozen=True)
class Individual:
    """A vector and its loss on the search images."""

    vector: Vector
    loss: float


class Strategy(Protocol):
    """Proposes vectors and learns from their losses.

    The loop calls `ask`, scores, calls `tell` with the scored vector, until `done` or a budget ends.
    """

    @property
    def done(self) -> bool:
        """True when the visit of this block is over."""
        ...

    @property
    def threshold(self) -> float:
        """Loss from which on a candidate cannot influence the search any more.

        The evaluator may stop scoring a candidate whose partial loss already reaches it, and tells `inf`.
        The result must be the same as if it had been scored in full; `inf` means: always score in full.
        """
        ...

    @property
    def races(self) -> bool:
        """Whether a child may be dropped once it is behind its parent, the best so far, on the images seen so far."""
        ...

    def ask(self) -> Vector:
        """Return a new vector (size,)."""
        ...

    def tell(self, vector: Vector, loss: float) -> None:
        """Report the loss of a vector; `inf` for one that was rejected early or was not finite."""
        ...

    def best(self) -> Individual:
        """The best individual seen, the start included."""
        ...
