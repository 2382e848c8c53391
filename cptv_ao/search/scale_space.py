"""Between vectors and a model: the scales of some tied groups of sites as one vector, written and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite
from cptv_ao.search.strategies.protocol import Group, Layout, Vector

#: A scale stays within this factor of the one in the model that was given: beyond it lies nothing but overflow.
_RANGE = 64.0

# QNNPACK's add takes inputs whose scale is at least 2^-14 and less than 2^8 of that of its output.
_LEAST_RATIO, _MOST_RATIO = 2.0**-14, 2.0**8 * (1 - 1e-6)


Beside = tuple[Tensor | None, Tensor | None]
"""Shift and correction of a weight."""


class ScaleSpace:
    """The groups of one block (or of the whole model) as a vector.

    Writes only what differs from what is in the model, and puts back the packed weights it has seen at `base`
    instead of packing them again.
    """

    def __init__(self, store: ScaleStore, groups: Mapping[str, tuple[ScaleSite, ...]]) -> None:
        self._store = store
        self._groups = dict(groups)
        self.layout = _layout(self._groups)
        self._current = self._read()
        self._limits = self._current.copy()
        self._states: dict[str, Any] = {}
        leads = ((store.sites[out].tied, store.sites[given].tied) for out, given in store.sums)
        self._sums = [pair for pair in leads if not self._groups.keys().isdisjoint(pair)]
        self._slices = {group.name: group.scales for group in self.layout.groups}
        self.rebase()

    @property
    def sites(self) -> list[ScaleSite]:
        """All that the vector moves."""
        return [site for group in self._groups.values() for site in group]

    @property
    def nodes(self) -> list[str]:
        """Names of the graph nodes whose values depend on this vector directly."""
        return [node for site in self.sites for node in site.nodes]

    @property
    def vector(self) -> Vector:
        """What is in the model now (a copy)."""
        return self._current.copy()

    @property
    def base(self) -> Vector:
        """The vector to which `write` returns for free (a copy)."""
        return self._base.copy()

    def rebase(self) -> None:
        """Make what is in the model now the base to which `write` returns for free."""
        self._base = self._current.copy()
        self._states = {site.name: self._store.state(site.name) for site in self.sites}

    def refresh(self) -> None:
        """Read the model again, after others wrote into it."""
        self._current = self._read()
        self.rebase()

    def repair(self, vector: Vector) -> Vector:
        """The nearest vector that the kernels can hold: float32 scales > 0, whole zero_points within their range."""
        repaired = vector.copy()
        for group in self.layout.groups:
            limits = self._limits[group.scales]
            scales = np.clip(vector[group.scales], limits / _RANGE, limits * _RANGE)
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

    def write(self, vector: Vector, beside: Mapping[str, Beside] | None = None) -> None:
        """Write a repaired vector into the model, and what some weights have beside it, by site name."""
        beside = beside or {}
        for group in self.layout.groups:
            parts = [group.scales] if group.zero_points is None else [group.scales, group.zero_points]
            if group.name in beside:
                site = self._groups[group.name][0]
                shift, correction = beside[site.name]
                qparams = self._qparams(vector, group, site)
                self._store.write(site.name, replace(qparams, shift=shift, correction=correction))
                self._current[group.scales] = vector[group.scales]
                continue
            if all(np.array_equal(vector[p], self._current[p]) for p in parts):
                continue
            at_base = all(np.array_equal(vector[p], self._base[p]) for p in parts)
            for site in self._groups[group.name]:
                if at_base:
                    self._store.restore(site.name, self._states[site.name])
                else:
                    self._store.write(site.name, self._qparams(vector, group, site))
            for part in parts:
                self._current[part] = vector[part]

    def undo(self) -> None:
        """Put the base back, with what weights have beside it."""
        for name, state in self._states.items():
            self._store.restore(name, state)
        self._current = self._base.copy()

    def from_assignment(self, values: Mapping[str, QParams]) -> Vector:
        """The vector of these scales; sites that are not named keep the scales that are in the model."""
        vector = self._current.copy()
        for group in self.layout.groups:
            if group.name in values:
                qparams = values[group.name]
                vector[group.scales] = qparams.scale.reshape(-1).numpy()
                if group.zero_points is not None:
                    vector[group.zero_points] = qparams.zero_point.reshape(-1).numpy()
        return vector

    def _read(self) -> Vector:
        vector = np.empty(self.layout.size, dtype=np.float64)
        for group in self.layout.groups:
            qparams = self._store.read(group.name)
            vector[group.scales] = qparams.scale.reshape(-1).numpy()
            if group.zero_points is not None:
                vector[group.zero_points] = qparams.zero_point.reshape(-1).numpy()
        return vector

    def _qparams(self, vector: Vector, group: Group, site: ScaleSite) -> QParams:
        scale = torch.from_numpy(vector[group.scales].copy()).reshape(site.shape)
        if group.zero_points is None:
            return replace(self._store.read(site.name), scale=scale)
        return QParams(scale, torch.from_numpy(vector[group.zero_points].copy()).to(torch.int64).reshape(site.shape))


def _layout(groups: Mapping[str, tuple[ScaleSite, ...]]) -> Layout:
    entries, start = [], 0
    for name, sites in groups.items():
        lead = sites[0]
        scales = slice(start, start + lead.numel)
        start = scales.stop
        zero_points = None
        if lead.affine:
            zero_points = slice(start, start + lead.numel)
            start = zero_points.stop
        entries.append(Group(name, lead.kind, scales, zero_points, lead.qmin, lead.qmax))
    return Layout(tuple(entries), start)
