"""Search on the float twin, ship on the kernels: `RefineConfig(score_on="simulation")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.pt2e import is_exported
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.scoring import Calibration, Images, Scoring, Shipped
from cptv_ao.reporting.report import Losses, Report, Status
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.scale_space import Assignment
from cptv_ao.simulation.simulated_backend import SimulatedBackend


class SimulatedProposer(Proposer):
    """Proposals for a search on the twin, computed on its device.

    Which sites the kernels saturate on is still found on the kernels: what they cannot add up would be rejected.

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
    ) -> None:
        super().__init__(backend, groups, calibration)
        self._simulated = simulated

    def _enter(self) -> None:
        simulated = self._simulated
        self._batches = [simulated.batch(batch) for batch in self._batches]
        self._teacher = [target.to(simulated.twin.device) for target in self._teacher]
        self._twin.to(simulated.twin.device)
        self._backend = as_backend(simulated)

    def _saturating(self, scales: Assignment) -> dict[str, int]:
        """On the kernels: none once the search is on the twin, which never saturates."""
        on_twin = self._backend is as_backend(self._simulated) or is_exported(self._backend.model)
        return {} if on_twin else super()._saturating(scales)


def as_backend(simulated: SimulatedBackend) -> Backend:
    """A simulated backend has the methods of a lowered one that a search calls."""
    return cast(Backend, simulated)


def on_device(simulated: SimulatedBackend, images: Images) -> Images:
    """Images and targets where the twin computes."""
    device = simulated.twin.device
    return Images(
        tuple(simulated.batch(batch) for batch in images.batches), tuple(t.to(device) for t in images.targets)
    )


def confirmed(
    found: Report, simulated: SimulatedBackend, backend: Backend, judge: Scoring | Shipped, before: Losses
) -> Report:
    """Write what was found into the lowered model, and keep it if its own kernels find it no worse on both sets.

    Args:
        found: what the search on the twin reports.
        judge, before: gives the losses of the lowered model that count, and those before the search.

    Returns:
        The report of what ships: before and after are losses of the kernels. Where they are worse, the model has the
        scales from before again.
    """
    told = f"searched on the simulation, whose loss went from {found.before.search:.5g} to {found.after.search:.5g}"
    if not found.moves:
        return replace(found, before=before, after=before, notes=(*found.notes, told))
    given = backend.snapshot()
    simulated.commit()
    after = judge.losses()
    if not after.worse_than(before):
        return replace(found, before=before, after=after, notes=(*found.notes, told + "; the kernels confirm it"))
    backend.restore_all(given)
    held_out = f", held-out {before.holdout:.5g} to {after.holdout:.5g}" if before.holdout and after.holdout else ""
    told += f"; rejected: on the kernels it went from {before.search:.5g} to {after.search:.5g}{held_out}"
    notes = (*found.notes, told + "; the default score_on='kernels' searches there")
    return replace(found, status=Status.REJECTED, before=before, after=before, moves=(), notes=notes)
