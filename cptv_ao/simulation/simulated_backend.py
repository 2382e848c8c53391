"""Searching on the twin in place of the kernels: the backend of a simulated model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.snapshots import Snapshots
from cptv_ao.core.batches import Batch
from cptv_ao.core.qparams import QParams, same
from cptv_ao.core.sites import ScaleSite, SiteTable
from cptv_ao.simulation.twin import Twin


class SimulatedBackend(Snapshots):
    """The sites of a lowered model, read from and written to its twin, on any device.

    It has the methods of `Backend`, so a search runs on either. Nodes of `model` have the names of those of the
    lowered model, so blocks and cuts are the same. The lowered model is only written by `commit`.

    Args:
        backend: of the lowered model, with its float weights.
        device: where the twin computes.

    Raises:
        UnsupportedModelError: the twin does not know an op.
    """

    def __init__(self, backend: Backend, device: torch.device | str = "cpu") -> None:
        self._backend = backend
        self.sites: SiteTable = backend.sites
        self.sums, self.form = backend.sums, backend.form
        self.twin = Twin(backend).to(device)
        self._given = {name: backend.read(name) for name in self.twin.names}

    def checked(self, batch: Batch) -> SimulatedBackend:
        """Itself, once the twin has been run: see `Twin.checked`."""
        self.twin.checked(batch)
        self._given = {name: self._given[name] for name in self.twin.names}
        return self

    @property
    def model(self) -> GraphModule:
        """What an evaluator runs."""
        return self.twin.module

    @property
    def float_weights(self) -> Mapping[str, Tensor]:
        """As of the lowered model."""
        return self._backend.float_weights

    def read(self, name: str) -> QParams:
        """Scale and zero_point as they are in the twin now."""
        return self.twin.sites.get(name) if name in self._given else self._backend.read(name)

    def write(self, name: str, qparams: QParams) -> None:
        """Write a scale into the twin; the codes of a weight are re-rounded.

        Raises:
            InvalidScaleError: see `QParams.checked`; the twin is untouched.
            KeyError: a weight site without a float weight, or a site that the output does not depend on.
        """
        if self.sites[name].kind == "weight" and name not in self.float_weights:
            raise KeyError(name)
        self.twin.sites.set(name, qparams)

    def state(self, name: str) -> Any:
        """What the twin holds at the site now, for `restore`."""
        return self.twin.sites.state(name) if name in self._given else None

    def restore(self, name: str, state: Any) -> None:
        """Put back what `state` returned."""
        if state is not None:
            self.twin.sites.restore(name, state)

    def correctable(self, name: str) -> bool:
        """As of the lowered model."""
        return self._backend.correctable(name)

    def movable(self) -> dict[str, tuple[ScaleSite, ...]]:
        """As of the lowered model, less what the twin's output does not depend on."""
        groups = self._backend.movable()
        return {lead: group for lead, group in groups.items() if all(site.name in self._given for site in group)}

    def commit(self) -> list[str]:
        """Write what moved since the twin was built into the lowered model; returns the names.

        Whether the kernels agree that it is better is for the caller to find out, and `Backend.restore_all` to
        undo.
        """
        moved_sites = []
        with self._backend.writing():
            for name, given in self._given.items():
                now = self.twin.sites.get(name)
                if not same(now, given):
                    self._backend.write(name, now)
                    moved_sites.append(name)
        return moved_sites

    def batch(self, batch: Batch) -> Batch:
        """A batch on the twin's device."""
        return batch.to(self.twin.device)
