"""How far a vector of scales may go: what the kernels can hold, and what their engine can add."""

from __future__ import annotations

import numpy as np

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.search.strategies.protocol import Layout, Vector

#: A scale stays within this factor of the one in the model that was given: beyond it lies nothing but overflow.
_RANGE = 64.0

# QNNPACK's add takes inputs whose scale is at least 2^-14 and less than 2^8 of that of its output.
_LEAST_RATIO, _MOST_RATIO = 2.0**-14, 2.0**8 * (1 - 1e-6)


class Reach:
    """Brings vectors of one layout into reach.

    Args:
        store: of the model; read where an add has a scale that the vector does not hold.
        start: the vector of the model that was given.
    """

    def __init__(self, store: ScaleStore, layout: Layout, start: Vector) -> None:
        self._store, self._layout, self._start = store, layout, start.copy()
        self._slices = {group.name: group.scales for group in layout.groups}
        leads = ((store.sites[out].tied, store.sites[given].tied) for out, given in store.sums)
        self._sums = [pair for pair in leads if not self._slices.keys().isdisjoint(pair)]

    def nearest(self, vector: Vector) -> Vector:
        """The nearest vector that the kernels can hold: float32 scales > 0, whole zero_points within their range."""
        repaired = vector.copy()
        for group in self._layout.groups:
            start = self._start[group.scales]
            scales = np.clip(vector[group.scales], start / _RANGE, start * _RANGE)
            repaired[group.scales] = scales.astype(np.float32)
            if group.zero_points is not None:
                repaired[group.zero_points] = np.clip(np.rint(vector[group.zero_points]), group.qmin, group.qmax)
        self._bring_near(repaired)
        return repaired

    def _bring_near(self, vector: Vector) -> None:
        """Move the output scale of each add of the engine into reach of its inputs', or the input's where only that
        can move."""
        for out, given in self._sums:
            if out == given:
                continue
            inside = self._scale(vector, given)
            if out in self._slices:
                scale = np.clip(self._scale(vector, out), inside / _MOST_RATIO, inside / _LEAST_RATIO)
                vector[self._slices[out]] = np.float32(scale)
            else:
                outside = self._scale(vector, out)
                vector[self._slices[given]] = np.float32(np.clip(inside, outside * _LEAST_RATIO, outside * _MOST_RATIO))

    def _scale(self, vector: Vector, lead: str) -> float:
        """Scale of an activation in a vector, or in the model where the vector does not hold it."""
        if lead in self._slices:
            return float(vector[self._slices[lead]][0])
        return float(self._store.read(lead).scale)
