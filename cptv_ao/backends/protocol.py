"""What a search needs of a model, whether it writes into the kernels' own scales or into those of the float twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from cptv_ao.backends.graph_form import GraphForm
from cptv_ao.backends.snapshots import SiteStates
from cptv_ao.core.qparams import QParams
from cptv_ao.core.sites import ScaleSite


class ScaleStore(SiteStates, Protocol):
    """Scales by site name, and the model that computes with them: of `Backend`, and of `SimulatedBackend`."""

    @property
    def form(self) -> GraphForm:
        """What form of graph it is, and what that can do."""

    @property
    def sums(self) -> tuple[tuple[str, str], ...]:
        """Pairs of sites, of the output and of an input of an add, whose scales the engine wants near each other."""

    @property
    def float_weights(self) -> Mapping[str, Tensor]:
        """From which weights are re-rounded, by site name."""

    def movable(self) -> dict[str, tuple[ScaleSite, ...]]:
        """Tied groups that can be searched, by the name of their leader."""

    def correctable(self, name: str) -> bool:
        """Whether the layer of a weight may get another bias."""

    def read(self, name: str) -> QParams:
        """What is at a site now."""

    def write(self, name: str, qparams: QParams) -> None:
        """Write it; a weight is re-rounded from its float weight.

        Raises:
            InvalidScaleError: see `QParams.checked`; nothing is written.
            KeyError: a weight site without a float weight.
        """

    def snapshot(self) -> dict[str, Any]:
        """`state` of every site."""

    def restore_all(self, snapshot: Mapping[str, Any]) -> None:
        """Put back a `snapshot`."""
