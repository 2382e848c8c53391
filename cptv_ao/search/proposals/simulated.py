"""Search on the float twin, ship on the kernels: `RefineConfig(score_on="simulation")`."""

from __future__ import annotations

from collections.abc import Mapping

from cptv_ao.backends.backend import Backend
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.simulation.simulated_backend import SimulatedBackend


class SimulatedProposer(Proposer):
    """Proposals for a search on the twin.

    Which sites the kernels saturate on is still found on the kernels, once: what they cannot add up would be rejected.

    Args:
        simulated: what is searched.
        backend: of the lowered model, as it was given.
    """

    def __init__(
        self,
        simulated: SimulatedBackend,
        backend: Backend,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        calibration: Calibration,
        budget: Budget,
    ) -> None:
        super().__init__(backend, groups, calibration, budget)
        self._simulated = simulated

    def _enter(self) -> None:
        self._store = self._simulated
