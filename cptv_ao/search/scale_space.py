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
from cptv_ao.search.reach import Reach
from cptv_ao.search.strategies.protocol import Group, Layout, Vector

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
        self._current = _read(self._store, self.layout)
        self._reach = Reach(store, self.layout, self._current)
        self._states: dict[str, Any] = {}
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
        self._current = _read(self._store, self.layout)
        self.rebase()

    def repair(self, vector: Vector) -> Vector:
        """The nearest vector that the kernels can hold: float32 scales > 0, whole zero_points within their range."""
        return self._reach.nearest(vector)

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


def _read(store: ScaleStore, layout: Layout) -> Vector:
    """What is in the model."""
    vector = np.empty(layout.size, dtype=np.float64)
    for group in layout.groups:
        qparams = store.read(group.name)
        vector[group.scales] = qparams.scale.reshape(-1).numpy()
        if group.zero_points is not None:
            vector[group.zero_points] = qparams.zero_point.reshape(-1).numpy()
    return vector
