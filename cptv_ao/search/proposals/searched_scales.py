"""What is searched, and the twin that says what to try there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.sites import ScaleSite
from cptv_ao.search.proposals.following import follow
from cptv_ao.simulation.twin import Twin


@dataclass(frozen=True)
class SearchedScales:
    """The scales that proposals are for.

    Attributes:
        kernels: of the model.
        store: holds the scales: that, or a simulation of it.
        groups: the tied groups that are searched, by the name of their leader.
        twin: of the model.
    """

    kernels: Backend
    store: ScaleStore
    groups: Mapping[str, tuple[ScaleSite, ...]]
    twin: Twin

    @property
    def on_kernels(self) -> bool:
        """Whether what is scored runs on the model's own kernels, not on its simulation."""
        return self.store is self.kernels

    def follow(self) -> None:
        """Give the twin the scales that are there."""
        follow(self.twin, self.store)

    def scales(self) -> Tensor:
        """All that are there, one after another: a copy, for `moved_since`."""
        return torch.cat([self.store.read(lead).scale.reshape(-1) for lead in self.groups])

    def moved_since(self, before: Tensor) -> bool:
        """Whether any is another than it was: something that was proposed was kept."""
        return not torch.equal(self.scales(), before)
